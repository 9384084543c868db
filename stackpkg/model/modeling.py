"""The reference model as an ordinary model of transformers, and `build`, which makes any model a profile names."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from stackpkg import params
from stackpkg.model.attention import CrossAttention, SelfAttention
from stackpkg.model.configuration import StackConfig, checked
from stackpkg.model.embedding import TextEmbedding
from stackpkg.model.experts import Experts, MixtureOfExperts, Router
from stackpkg.model.patterns import documents, layout
from stackpkg.model.rotary import rotary
from stackpkg.model.scopes import Scopes


@dataclass
class StackOutput(MoeCausalLMOutputWithPast):
    """The usual output, plus, when asked for, a dictionary of attention statistics of each layer, the probability
    [b, L, heads] that each layer puts on edges its scopes forbid, and, beside hidden states, the embedding [b, size] of
    each text.
    """

    attention_statistics: tuple[dict[str, Tensor], ...] | None = None
    forbidden_mass: tuple[Tensor, ...] | None = None
    text_embedding: Tensor | None = None


class StackLayer(GradientCheckpointingLayer):
    """x + attention(norm x), + cross-attention to retrieved records on odd layers, + experts(norm x)."""

    def __init__(self, config: StackConfig, index: int) -> None:
        super().__init__()
        norm = (config.hidden_size, config.rms_norm_eps)
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(*norm), nn.RMSNorm(*norm)
        self.self_attn, self.mlp = SelfAttention(config, index), MixtureOfExperts(config)
        self.reads_memory = config.retrieval and index % 2 == 1
        if self.reads_memory:
            self.cross_norm, self.cross_attn = nn.RMSNorm(*norm), CrossAttention(config)

    def forward(self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None, **shared: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), **shared)[0]
        if self.reads_memory and memory is not None:
            x = x + self.cross_attn(self.cross_norm(x), *memory)
        return x + self.mlp(self.post_attention_layernorm(x))


class StackPreTrainedModel(PreTrainedModel):
    config: StackConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["StackLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _can_set_experts_implementation_cached_value = True  # transformers looks for the decorator in this file alone
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(Router, index=0),
        "hidden_states": StackLayer,
        "attention_statistics": OutputRecorder(SelfAttention, index=1),
        "forbidden_mass": OutputRecorder(SelfAttention, index=2),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, (Experts, Router)):
            spread, width = self.config.router_spread, self.config.hidden_size
            routes = isinstance(module, Router) and spread
            for weight in module.parameters():  # of normalised states of `width` numbers, logits of that spread
                init.normal_(weight, 0.0, spread / width**0.5 if routes else self.config.initializer_range)
            for bias in module.buffers():
                init.zeros_(bias)
        if isinstance(module, SelfAttention) and self.config.feature_map == "favor":
            init.copy_(module.features, module.draw())


class StackModel(StackPreTrainedModel):
    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        if config.retrieval and config.pad_token_id is None:
            raise ValueError("retrieval needs pad_token_id, which keeps the records in memory_ids apart; give it")
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([StackLayer(config, index) for index in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.retrieval:
            self.memory_norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, memory_ids: Tensor | None = None,
        memory_embeds: Tensor | None = None, scopes: Scopes | None = None,
        output_attention_statistics: bool = False, **_: Any,
    ) -> MoeModelOutputWithPast:  # fmt: skip
        """`input_ids` [b, L] or `inputs_embeds` [b, L, hidden]. No cache: every call computes all positions.
        `memory_ids` [b, n]: tokens of the records that retrieval found for each row and its guard let pass, one after
        another with `pad_token_id` between them and after the last; read where the configuration says `retrieval`.
        `memory_embeds` [b, n, hidden]: their embeddings, normalised, from a pipeline stage before.
        `attention_mask` [b, L] is only checked: what is padded on the right is never seen by the rest.
        `position_ids` [b, L] that restart at 0 separate packed documents: none sees another, as in transformers.
        `scopes` are enforced, or only measured, as they say; `output_forbidden_mass=True` returns what was measured.
        """
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("this model needs padding on the right; set tokenizer.padding_side = 'right'")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device)[None]
        position_ids = position_ids.expand(x.shape[:2])
        layouts = None
        if x.shape[1] <= self.config.linear_from:
            patterns = {self.config.pattern(index) for index in range(len(self.layers))}
            layouts = {name: layout(self.config, name, position_ids, x.dtype, scopes) for name in patterns}
        memory = None
        if self.config.retrieval and memory_ids is None and input_ids is not None and torch.is_grad_enabled():
            # nothing to read, and a gradient of 0 all the same: FSDP2 with replicas (torch 2.13) can't add up what
            # forwards of one step give when some leave out parameters that others use
            memory_ids = torch.full_like(input_ids[:, :1], cast(int, self.config.pad_token_id))
        if memory_ids is not None and self.config.retrieval:
            if memory_embeds is None:
                memory_embeds = self.memory_norm(self.embed_tokens(memory_ids))
            memory = memory_embeds, memory_ids != self.config.pad_token_id
        shared = {"rotation": rotary(self.config, position_ids, x.dtype), "document": documents(position_ids)}
        for layer in self.layers:
            x = layer(x, memory, layouts=layouts, scopes=scopes, measure=output_attention_statistics, **shared)
        return MoeModelOutputWithPast(last_hidden_state=self.norm(x))


class StackForCausalLM(StackPreTrainedModel, GenerationMixin):
    """Decoder with a language-modelling head. `from_pretrained(..., distributed_config=...)` spreads it."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _fsdp_plan = {"lm_head": "keep_full_weight"}  # noqa: RUF012

    def __init__(self, config: StackConfig) -> None:
        super().__init__(config)
        self.model = StackModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.embedder = None
        if config.embedding_size:
            if config.pad_token_id is None:
                raise ValueError("embedding_size needs pad_token_id, which tells where a text ends; give it")
            sizes = config.vocab_size, config.hidden_size, config.embedding_size
            self.embedder = TextEmbedding(*sizes, config.pad_token_id)
        self.post_init()

    @can_return_tuple
    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, labels: Tensor | None = None, logits_to_keep: int = 0,
        num_items_in_batch: Tensor | int | None = None, memory_ids: Tensor | None = None,
        text_ids: Tensor | None = None, **kwargs: Any,
    ) -> StackOutput:  # fmt: skip
        """Logits [b, L, vocab], or of the last `logits_to_keep` positions; with `labels` the next-token loss.

        With `output_hidden_states` also the embedding of each text; `text_ids` [b, L] are its tokens where `input_ids`
        are not at hand. `position_ids` and `memory_ids` are named because the stock `Trainer` drops from a batch what a
        forward does not name.
        """
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        out = self.model(**given, memory_ids=memory_ids, **kwargs)
        logits = self.lm_head(out.last_hidden_state[:, -logits_to_keep:].contiguous())  # DTensor needs it
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, num_items_in_batch=num_items_in_batch)
        recorded = {name: out.get(name) for name in self._can_record_outputs}
        text_ids, embedding = input_ids if text_ids is None else text_ids, None
        if self.embedder is not None and kwargs.get("output_hidden_states") and text_ids is not None:
            embedding = self.embedder(out.last_hidden_state, text_ids)
        return StackOutput(loss=loss, logits=logits, text_embedding=embedding, **recorded)


@torch.no_grad()
def attention_statistics(model: PreTrainedModel, input_ids: Tensor) -> dict[str, Tensor]:
    """One forward that measures attention: `entropy` and `masked_edge_share` [layers, heads], both in [0, 1], and
    what the KV codec and its cache measure, `kv_ratio` and others [layers]. Every rank must call it; a tensor-parallel
    rank gets its heads.
    Empty for a model other than the reference model.
    """
    if not isinstance(model, StackForCausalLM):
        return {}
    return by_layer(model(input_ids=input_ids, output_attention_statistics=True, logits_to_keep=1))


def by_layer(outputs: StackOutput) -> dict[str, Tensor]:
    """The attention statistics of a forward that measured them, each [layers, ...]."""
    layers = outputs.attention_statistics or ()
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}


def configure(model: params.Model, **values: Any) -> PreTrainedConfig:
    """The configuration a profile asks for; `values` are used where it says nothing and names no model to load.

    Raises `ValueError` for an unknown architecture or an unknown key.
    """
    if model.name_or_path:
        return AutoConfig.from_pretrained(model.name_or_path, **model.config)
    values |= model.config
    kind = StackConfig.model_type if model.kind == "stack" else values.pop("model_type", "")
    return checked(type(AutoConfig.for_model(kind)), values)


def build(model: params.Model, vocab_size: int, pad_token_id: int, seed: int) -> PreTrainedModel:
    """The causal language model a profile asks for, in fp32, its weights drawn from `seed`.

    Stock auxiliary losses are switched off: their size grows with accumulation and ranks (`objectives` has ours).
    Raises `ValueError` for an unknown architecture, an unknown key, or a vocabulary smaller than the tokenizer's.
    """
    config = configure(model, vocab_size=vocab_size, pad_token_id=pad_token_id)
    if config.vocab_size < vocab_size:
        raise ValueError(f"the model's vocab_size {config.vocab_size} is below the tokenizer's {vocab_size}")
    if "router_aux_loss_coef" in config.to_dict():
        config.router_aux_loss_coef = 0.0
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if model.name_or_path:
            return AutoModelForCausalLM.from_pretrained(model.name_or_path, config=config, dtype=torch.float32)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def weight(model: params.Model, vocab_size: int, pad_token_id: int) -> int:
    """Bytes of the weights that `build` draws or reads, counted without any of them."""
    config = configure(model, vocab_size=vocab_size, pad_token_id=pad_token_id)
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return sum(parameter.numel() * parameter.element_size() for parameter in made.parameters())
