"""Conversations to packed rows of tokens, masks, segments and positions."""

from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.template import Template, encode, encode_prompt, render
from keras_gemma_ft.data.tokenizer import Tokenizer

__all__ = ["Conversation", "Template", "Tokenizer", "encode", "encode_prompt", "render"]
