"""Conversations to packed rows of tokens, masks, segments and positions."""

from keras_gemma_ft.data.dataset import PackedDataset
from keras_gemma_ft.data.pipeline import iterate, tf_dataset
from keras_gemma_ft.data.prepare import prepare
from keras_gemma_ft.data.rows import Conversation
from keras_gemma_ft.data.shards import Recipe
from keras_gemma_ft.data.template import Template, encode, encode_prompt, render
from keras_gemma_ft.data.tokenizer import Tokenizer

__all__ = [
    "Conversation",
    "PackedDataset",
    "Recipe",
    "Template",
    "Tokenizer",
    "encode",
    "encode_prompt",
    "iterate",
    "prepare",
    "render",
    "tf_dataset",
]
