"""The average of the weights in one process; sharded, it is tested by the launches of test_training.py."""

import pytest
import torch

from stackpkg.training.ema import ShardedEMA


def network(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.LayerNorm(7), torch.nn.Linear(7, 2)).to(dtype)


def wander(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype))


def bits(model: torch.nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


def same(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_the_average_is_that_of_a_plain_loop(decay: float, dtype: torch.dtype) -> None:
    model = network(dtype)
    ema, seen = ShardedEMA(model, decay), []
    for t in range(30):
        wander(model, t)
        ema.update()
        seen.append(bits(model))
    # closed form: w_t = (1 - d_t) prod_(s > t) d_s over the weights seen, without the initial ones, normalised
    decays = torch.tensor([min(decay, t / (9 + t)) for t in range(1, 31)], dtype=torch.double)
    share = (1 - decays) * torch.cat([decays, torch.ones(1)])[1:].flip(0).cumprod(0).flip(0)
    share = share / share.sum()
    each = [torch.stack([p.double() for p in history]) for history in zip(*seen, strict=True)]
    expected = [torch.tensordot(share, history, 1).float() for history in each]
    assert ema.updates == 30 and all(shadow.dtype == torch.float32 for shadow in ema.shadow.values())
    torch.testing.assert_close(list(ema.shadow.values()), expected, rtol=1e-5, atol=1e-5)


def test_an_average_is_no_alias_of_the_weights() -> None:
    model = network()
    ema = ShardedEMA(model, 0.9)
    before = {name: shadow.clone() for name, shadow in ema.shadow.items()}
    wander(model, 0)
    assert all(torch.equal(ema.shadow[name], shadow) for name, shadow in before.items())


def test_swapped_runs_on_the_average_and_gives_the_weights_back_to_the_bit() -> None:
    model = network()
    ema = ShardedEMA(model, 0.5)
    for t in range(3):
        wander(model, t)
        ema.update()
    weights, shadow = bits(model), [tensor.clone() for tensor in ema.shadow.values()]
    assert not same(weights, shadow)
    with ema.swapped():
        assert same(bits(model), shadow)
    assert same(bits(model), weights)
    with pytest.raises(ArithmeticError, match="evaluation failed"), ema.swapped():
        raise ArithmeticError("evaluation failed")
    assert same(bits(model), weights)
    assert same(list(ema.shadow.values()), shadow)


@pytest.mark.parametrize("updates", [1, 2, 12])
def test_an_average_has_nothing_of_the_initial_weights(updates: int) -> None:
    """Debiased: however the model began, the same weights seen after that give the same average, from the first on."""
    averages = []
    for start in (0.0, 1e6):
        model = network()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(start)
        ema = ShardedEMA(model, 0.999)
        for t in range(updates):
            torch.manual_seed(t)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape))
            ema.update()
        averages.append(list(ema.shadow.values()))
        if updates == 1:
            assert same(averages[-1], bits(model)), "the first average is the first weights"
    assert same(*averages)


def test_load_takes_the_numbers_of_a_checkpoint() -> None:
    trained, fresh = network(), network()
    ema, other = ShardedEMA(trained, 0.5), ShardedEMA(fresh, 0.5)
    wander(trained, 1)
    ema.update()
    other.load(ema.shadow)
    other.resume(ema.updates)
    assert (other.updates, other.unseen) == (ema.updates, ema.unseen)
    assert same(list(other.shadow.values()), list(ema.shadow.values()))
    fresh.load_state_dict(trained.state_dict())
    for model, average in ((trained, ema), (fresh, other)):  # from here on both go the same way
        wander(model, 2)
        average.update()
    assert same(list(other.shadow.values()), list(ema.shadow.values()))
