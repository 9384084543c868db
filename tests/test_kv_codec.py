"""The KV codec and its cache: round trip at every scale and type, both versions of the format, budget and counters."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stackpkg import params
from stackpkg.model import StackConfig, build, kv_codec
from stackpkg.model.kv_codec import Cache, Encoded

DTYPES = st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16])


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm_error(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    return (new.norm(dim=-1) - old.norm(dim=-1)).abs() / old.norm(dim=-1)


# ---- codec


@settings(max_examples=30, deadline=None)
@given(
    exponent=st.integers(-3, 3), length=st.integers(1, 70), d=st.sampled_from([64, 128]), seed=st.integers(0, 99),
    dtype=DTYPES,
)  # fmt: skip
def test_norms_keep_1e_3_at_every_scale_and_type(
    exponent: int, length: int, d: int, seed: int, dtype: torch.dtype
) -> None:
    cache = (drawn(seed, 2, length, 2, d) * 10.0**exponent).to(dtype)
    back, old = kv_codec.decode(kv_codec.encode(cache, keep=16)), cache.float()
    assert back.shape == cache.shape and back.dtype == torch.float32
    assert norm_error(back, old).max() <= 1e-3
    assert 1e-3 < (back - old)[:, :-16].norm() / old[:, :-16].norm() < 0.01 or length <= 16, "the honest distortion"


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(0, 20), st.integers(1, 3), st.integers(1, 80)),
    keep=st.integers(0, 25), dtype=DTYPES, version=st.sampled_from([1, 2]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_shape_comes_back_within_half_a_step(
    shape: tuple, keep: int, dtype: torch.dtype, version: int, seed: int
) -> None:
    cache = drawn(seed, *shape).to(dtype)
    encoded = kv_codec.encode(cache, keep, version)
    back, kept = kv_codec.decode(encoded), min(keep, shape[1])
    assert back.shape == shape and encoded.version == version
    assert encoded.recent.shape[1] == kept and encoded.codes.shape == (
        -(-(shape[1] - kept) * cache[0, :1].numel() * shape[0] // 64) if shape[1] else 0,
        64,
    )
    assert torch.equal(back[:, shape[1] - kept :], cache[:, shape[1] - kept :].half().float())
    # half a step of a block, and in version 2 the rescaling of at most a step's share
    assert (back - cache.float()).abs().max() <= cache.float().abs().max() / 127 if cache.numel() else True


@settings(max_examples=40, deadline=None)
@given(exponent=st.integers(-45, -5), version=st.sampled_from([1, 2]), seed=st.integers(0, 99))
def test_tiny_numbers_stay_finite_and_never_grow(exponent: int, version: int, seed: int) -> None:
    cache = drawn(seed, 1, 8, 1, 64) * 10.0**exponent
    back = kv_codec.decode(kv_codec.encode(cache, 0, version))
    assert back.isfinite().all()
    # below fp16's range a scale rounds to a neighbour half of 2^-24 away, times 127 codes in version 1
    assert (back - cache).abs().max() <= cache.abs().max() * 0.01 + 2.0**-25 * (127 if version == 1 else 1.01)


def test_blocks_of_zeros_stay_zeros() -> None:
    cache = torch.zeros(1, 3, 1, 64)
    cache[0, 1] = 2.0
    for version in (1, 2):
        back = kv_codec.decode(kv_codec.encode(cache, 0, version))
        assert torch.equal(back[0, ::2], cache[0, ::2])
        torch.testing.assert_close(back[0, 1], cache[0, 1], rtol=1e-3, atol=0)
    zeros = kv_codec.measure(cache * 0, cache * 0, 1)
    assert zeros["kv_error"] == 0 and zeros["kv_distortion"] == 0


@settings(max_examples=20, deadline=None)
@given(
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    place=st.integers(0, 19),
    keep=st.integers(0, 20),
    dtype=DTYPES,
)
def test_nan_and_infinity_are_refused(bad: float, place: int, keep: int, dtype: torch.dtype) -> None:
    cache = torch.ones(1, 20, 1, 8, dtype=dtype)
    cache[0, place, 0, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        kv_codec.encode(cache, keep)
    found = kv_codec.measure(cache, cache, keep)  # telemetry of a step that went wrong must not stop it
    assert not found["kv_error"].isfinite() and found["kv_ratio"].isfinite()


@pytest.mark.parametrize(
    ("cache", "complaint"),
    [
        (torch.full((1, 4, 1, 64), 1e5), "holds 100000; allowed"),
        (torch.ones(4, 1, 64), r"\[4, 1, 64\]"),
        (torch.ones(1, 4, 1, 64).long(), "torch.int64"),
    ],
)
def test_what_does_not_fit_is_refused(cache: torch.Tensor, complaint: str) -> None:
    for keep in (0, 4):
        with pytest.raises(ValueError, match=complaint):
            kv_codec.encode(cache, keep)


# What version 1 and 2 wrote for `GOLDEN_INPUT`, keep=1, as the bytes of the three tensors.
CODES = (
    "81df3d9af856b41270cd2b89e745a2005ebb1977d53390ee4caa0866c3217fdc"
    "1775d2308eec4aa70563c01e7cda3895f351af0d6bc82684e2409dfb59b61472"
)
SCALES = {1: "4d26", 2: "4042"}
RECENT = (
    "c03d20c100b42040c0bf0036604140bd003c00c280b9803ec0c000ac804000bf"
    "c0bc803cc0c180b8003f80c0002cc04080be8039004200bc403d60c100b6c03f"
)
GOLDEN_INPUT = ((torch.arange(2 * 3 * 2 * 8).float() * 37 % 101 - 50) / 16).view(2, 3, 2, 8)


def stored(text: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=dtype)


@pytest.mark.parametrize("version", [1, 2])
def test_the_last_two_versions_decode_what_they_once_wrote(version: int) -> None:
    codes, scales = stored(CODES, torch.int8).view(1, 64), stored(SCALES[version], torch.float16).view(1, 1)
    recent = stored(RECENT, torch.float16).view(2, 1, 2, 8)
    back = kv_codec.decode(Encoded(version, (2, 3, 2, 8), codes, scales, recent))
    step = scales.double().item() / {1: 1, 2: 127}[version]
    by_hand = torch.cat(((codes.double() * step).view(2, 2, 2, 8), recent.double()), 1)
    torch.testing.assert_close(back.double(), by_hand, rtol=1e-6, atol=0)
    assert (back - GOLDEN_INPUT).abs().max() < 0.02
    now = kv_codec.encode(GOLDEN_INPUT, 1, version)
    assert torch.equal(now.codes, codes) and torch.equal(now.recent, recent)
    torch.testing.assert_close(now.scales, scales, rtol=2**-10, atol=0)


def test_an_unknown_version_is_refused_and_version_2_mends_subnormal_scales() -> None:
    cache = drawn(0, 1, 100, 2, 24) * 1e-4
    errors = [(kv_codec.decode(kv_codec.encode(cache, 10, v)) - cache)[:, :90].norm().item() for v in (1, 2)]
    assert errors[1] < 0.8 * errors[0] < cache.norm()
    with pytest.raises(ValueError, match="version 3"):
        kv_codec.decode(kv_codec.encode(cache, 10)._replace(version=3))


def test_the_ratio_counts_every_byte() -> None:
    cache = drawn(0, 1, 100, 2, 24)
    # 2 x 90 tokens x 48 numbers = 135 blocks x (64 + 2) bytes; 10 x 48 x 2 bytes kept; 9,600 bytes each in fp16
    assert kv_codec.measure(cache, cache, 10)["kv_ratio"] == pytest.approx((135 * 66 / 2 + 960) / 9600, rel=1e-6)
    whole = drawn(0, 1, 512, 8, 128)
    found = kv_codec.measure(whole, whole, 0)
    assert found["kv_ratio"] == pytest.approx(66 / 128)
    assert found["kv_error"] <= 1e-3 < found["kv_distortion"] < 0.01


def test_vectors_shorter_than_a_block_keep_the_norm_on_average_only() -> None:
    short = drawn(0, 2, 256, 2, 16)
    found, back = kv_codec.measure(short, short, 0), kv_codec.decode(kv_codec.encode(short, 0))
    assert found["kv_error"] < 2e-3 < norm_error(back, short).max() < 2e-2


# ---- cache


def chunk(seed: int, n: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    return drawn(seed, 1, n, 2, 64), drawn(seed + 1000, 1, n, 2, 64)


SIZE = 2 * 8 * 2 * 66  # bytes of one such chunk


def test_the_least_recently_used_chunk_goes_when_the_budget_is_spent() -> None:
    cache = Cache(3 * SIZE)
    for name in range(3):
        cache.write(name, *chunk(name))
    assert cache.used == 3 * SIZE and cache.report()["kv_evictions"] == 0
    assert cache.read(0) is not None  # now 1 is the oldest
    cache.write(3, *chunk(3))
    assert cache.read(1) is None and all(cache.read(name) is not None for name in (0, 2, 3))
    found = cache.report()
    assert found["kv_evictions"] == 1 and found["kv_hit_rate"] == 4 / 5 and len(cache) == 3


def test_a_chunk_written_again_replaces_itself() -> None:
    cache = Cache(2 * SIZE)
    for name, seed in (("a", 0), ("b", 1), ("a", 2)):
        cache.write(name, *chunk(seed))
    assert cache.used == 2 * SIZE and cache.report()["kv_evictions"] == 0
    torch.testing.assert_close(cache.read("a")[0], chunk(2)[0], atol=0.05, rtol=0)


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 6), st.integers(1, 8)), max_size=30), room=st.integers(1, 4)
)
def test_the_budget_holds_and_the_counters_add_up(steps: list[tuple[bool, int, int]], room: int) -> None:
    cache, kept, hits, reads, evictions = Cache(room * SIZE), {}, 0, 0, 0
    for writing, name, n in steps:
        if writing:
            kept.pop(name, None)
            while sum(kept.values()) + 2 * n * 2 * 66 > room * SIZE:
                kept.pop(next(iter(kept)))
                evictions += 1
            cache.write(name, *chunk(name, n))
            kept[name] = 2 * n * 2 * 66
        else:
            found = cache.read(name)
            reads, hits = reads + 1, hits + (name in kept)
            assert (found is not None) == (name in kept)
            if name in kept:
                kept[name] = kept.pop(name)
        assert cache.used == sum(kept.values()) <= room * SIZE and len(cache) == len(kept)
    report = cache.report()
    assert report["kv_evictions"] == evictions
    assert report["kv_hit_rate"] == hits / reads if reads else math.isnan(report["kv_hit_rate"])


def test_an_empty_cache_reports_nothing_and_a_chunk_too_large_is_refused() -> None:
    cache = Cache(SIZE - 1)
    with pytest.raises(ValueError, match=f"takes {SIZE} bytes, the budget is {SIZE - 1}"):
        cache.write("a", *chunk(0))
    report = cache.report()
    assert report.pop("kv_evictions") == 0 and all(math.isnan(value) for value in report.values())


def test_the_cache_reports_on_the_keys_and_values_of_a_model() -> None:
    config = {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64,
        "moe_intermediate_size": 32, "num_experts": 1, "num_experts_per_tok": 1, "sliding_window": 32, "block_size": 16,
    }  # fmt: skip
    model, ids = build(params.Model(config=config), 64, 0, 3), torch.randint(1, 64, (2, 128))
    assert isinstance(model.config, StackConfig)
    cache, seen = Cache(10**6), []

    def keep(layer: int) -> object:
        def hook(module: torch.nn.Module, given: tuple, result: object) -> None:
            _, k, v = module.project(given[0], given[0])
            seen.append((k, v))
            for number, (some_k, some_v) in enumerate(zip(k.split(32, 1), v.split(32, 1), strict=True)):
                cache.write((layer, number), module.k_norm(some_k), some_v)

        return hook

    for index, layer in enumerate(model.model.layers):
        layer.self_attn.register_forward_hook(keep(index))
    with torch.no_grad():
        model(input_ids=ids)
    k, v = cache.read((1, 2))
    assert norm_error(v, seen[1][1][:, 64:96]).max() <= 1e-3 and k.shape == v.shape == (2, 32, 1, 64)
    report = cache.report()
    assert report["kv_error"] <= 1e-3 < report["kv_distortion"] < 0.01, "norms hold; the numbers themselves lose more"
    assert report["kv_ratio"] == pytest.approx(66 / 128) and report["kv_hit_rate"] == 1 and report["kv_evictions"] == 0


def test_a_replay_counts_what_a_cache_of_half_the_row_keeps() -> None:
    k, v = (torch.randn(1, 64, 2, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))

    # chunks of 8, window of 16: at token 31 chunks 0 and 1 have left it, at 63 chunks 0 to 5; the cache holds four
    def told(reads: dict[int, list[int]]) -> tuple[float, float]:
        found = kv_codec.replay(k, v, reads, 8, 16)
        return float(found["kv_hit_rate"]), float(found["kv_evictions"])

    assert told({31: [0, 1], 63: [4, 5]}) == (1.0, 2.0)
    assert told({31: [1], 63: [0, 1, 2, 5]}) == (pytest.approx(0.6), 2.0), "0 and 1 went, the newest are there"
    assert math.isnan(told({31: [3], 20: [1]})[0]), "still in the window: nothing is read"
    assert told({})[1] == 0
    for damage in (float("nan"), 1e6):
        broken = kv_codec.replay(k * damage, v, {31: [0]}, 8, 16)
        assert broken["kv_hit_rate"].isnan() and broken["kv_evictions"] == 0
