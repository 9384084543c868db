"""The reference model. Importing this package registers it with the Auto classes of transformers."""

from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from stackpkg.model import tensor_parallel as tensor_parallel  # registers its styles
from stackpkg.model.configuration import StackConfig
from stackpkg.model.modeling import StackForCausalLM, attention_statistics, build, weight

__all__ = ["StackConfig", "StackForCausalLM", "attention_statistics", "build", "weight"]
disable_progress_bar()  # a bar for every load has no place in an executed notebook
AutoConfig.register(StackConfig.model_type, StackConfig)
AutoModelForCausalLM.register(StackConfig, StackForCausalLM)
