"""Conversations to packed rows of tokens, masks, segments and positions."""
