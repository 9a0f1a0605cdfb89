"""Pretrained softmax transformers into hybrid linear-attention models, Hugging Face weights in and out."""

__version__ = "0.1.0"
