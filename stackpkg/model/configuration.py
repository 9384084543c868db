"""Configuration of the reference model, with the plans that spread it over tensor, expert and data ranks."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from stackpkg.schema import allowed


@strict
class StackConfig(PreTrainedConfig):
    """Sizes of a decoder with window attention, block summaries, optional retrieval and a mixture of experts.

    A dense feed-forward network is `num_experts = num_experts_per_tok = 1`. Raises `ValueError` where sizes clash.
    """

    model_type = "stackpkg"
    base_model_tp_plan: ClassVar[dict[str, Any]] = {
        **{f"layers.*.{tier}_attn.{name}_proj": "colwise" for tier in ("self", "cross") for name in "qkv"},
        **{f"layers.*.{tier}_attn.o_proj": "rowwise" for tier in ("self", "cross")},
        **{f"layers.*.{tier}_norm": "replicated_with_grad_allreduce"
           for tier in ("self_attn.q", "self_attn.k", "cross_attn.q", "cross_attn.k")},
        "layers.*.self_attn.pool": "replicated_with_grad_allreduce",
        "layers.*.self_attn": "all_heads",
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }  # fmt: skip
    base_model_ep_plan: ClassVar[dict[str, Any]] = {
        **{f"layers.*.mlp.experts.{name}_proj": "grouped_gemm" for name in ("gate_up", "down")},
        "layers.*.mlp.experts": "ep_dispatch_experts",
    }

    vocab_size: int = 4096
    hidden_size: int = 4096
    num_hidden_layers: int = 48
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    moe_intermediate_size: int = 12288  # 3 x hidden_size
    num_experts: int = 64
    num_experts_per_tok: int = 2
    gate_temperature: float = 1.0  # router logits are divided by it
    attention_pattern: Literal["sliding", "dilated", "block", "hybrid"] = "sliding"  # `pattern` says what each sees
    sliding_window: int = 512  # tokens a query sees exactly, itself included; also the chunk of the KV codec
    dilation: int = 4  # dilated: the distance between the tokens seen
    block_size: int = 128  # tokens pooled together once the block is finished
    summaries_per_block: int = 2  # 0: no summaries, the window is all a layer sees
    summary_pooling: Literal["mean", "max", "attention"] = "mean"
    summaries_per_level: int = 64  # nearest summaries that are seen as they are; further back, coarser ones
    linear_from: int = 65536  # longer rows: attention by `feature_map`, without a window or summaries
    feature_map: Literal["elu", "favor"] = "elu"
    rope_theta: float = 1e6
    rope_alpha: float = 0.75  # trained length / served length; below 1 extends the context
    embedding_size: int = 0  # numbers that embed a text for retrieval (`TextEmbedding`); 0: its last hidden states do
    retrieval: bool = False  # cross-attention over the tokens of retrieved records, `memory_ids`, on odd layers
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    router_spread: float = 0.0  # of router logits at first, at any width; 0: as `initializer_range` has it
    use_cache: bool = False
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if (
            self.num_attention_heads % self.num_key_value_heads
            or self.summaries_per_block < 0
            or self.block_size % max(1, self.summaries_per_block)
            or self.block_size > self.sliding_window // (1 + (self.attention_pattern == "block"))  # else out of sight
            or (self.attention_pattern == "block" and self.sliding_window % 2)
            or min(self.dilation, self.summaries_per_level) < 1
            or not 1 <= self.num_experts_per_tok <= self.num_experts
            or not 0 < self.rope_alpha <= 1
            or min(self.embedding_size, self.router_spread) < 0
        ):
            raise ValueError(
                "num_attention_heads must be a multiple of num_key_value_heads, block_size of summaries_per_block and "
                "at most sliding_window (half of it, which must be even, for the pattern block), dilation and "
                "summaries_per_level positive, embedding_size and router_spread at least 0, "
                f"num_experts_per_tok in 1..num_experts, rope_alpha in (0, 1]; given {self}"
            )

    def pattern(self, layer: int) -> str:
        """What the queries of a layer see exactly, of their own document, with w = `sliding_window`: `sliding` the last
        w tokens; `dilated` the last w of every `dilation`-th token, counted from the query; `block` its own and the
        previous block, of w/2 tokens each. `hybrid` is sliding on even layers and dilated on odd ones: interleaved
        residual blocks, as in the Sparse Transformer (arXiv 1904.10509, sec. 5.1). All of it never reads over w tokens.
        """
        return ("sliding", "dilated")[layer % 2] if self.attention_pattern == "hybrid" else self.attention_pattern

    @property
    def segment(self) -> int:
        """Tokens behind one summary."""
        return self.block_size // max(1, self.summaries_per_block)

    def pooled(self, length: int) -> int:
        """Tokens of a row of `length` that summaries stand for: those of whole blocks."""
        return length // self.block_size * self.block_size if self.summaries_per_block else 0


def checked(config_class: type[PreTrainedConfig], values: Mapping[str, Any]) -> PreTrainedConfig:
    """`config_class(**values)`. Raises `ValueError` with the nearest name for a key that the class does not define
    (transformers keeps such keys in silence) and for a value it refuses.
    """
    declared = [field.name for field in dataclasses.fields(config_class)]
    names = [*declared, *config_class.attribute_map, "head_dim"]  # the last is read by some that do not declare it
    for key in set(values) - set(names):
        raise ValueError(f"model.config.{key}: unknown key of {config_class.__name__}; {allowed(key, names)}")
    try:
        return config_class(**values)
    except Exception as error:  # strict dataclasses raise their own family of exceptions
        raise ValueError(f"model.config is not a valid {config_class.__name__}: {error}") from error
