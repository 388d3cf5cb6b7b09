"""Models and training settings of Lightning and of Hugging Face's Trainer, as `bilevel.tune` takes them."""

from bilevel.integrations import lightning, transformers

__all__ = ["lightning", "transformers"]
