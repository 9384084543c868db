"""The reference model. Importing this package registers it with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModelForCausalLM

from stackpkg.model.configuration import StackConfig
from stackpkg.model.modeling import StackForCausalLM, attention_statistics, build

__all__ = ["StackConfig", "StackForCausalLM", "attention_statistics", "build"]
AutoConfig.register(StackConfig.model_type, StackConfig)
AutoModelForCausalLM.register(StackConfig, StackForCausalLM)
