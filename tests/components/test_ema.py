"""The moving average on the tensors a rank owns."""

import pytest
import torch

from components.ema import Ema


def test_average_follows_the_closed_form_with_a_warmed_up_decay() -> None:
    master = torch.zeros(3)
    ema = Ema([master], 0.5)
    expected = torch.zeros(3)
    for step in range(20):
        master.add_(1.0)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * master
        ema.update(step)
        torch.testing.assert_close(ema.averages[0], expected)
    assert torch.equal(master, torch.full((3,), 20.0))


def test_average_of_shards_is_the_shard_of_the_average() -> None:
    whole = torch.arange(10.0)
    parts = [whole[:4].clone(), whole[4:].clone()]
    one, two = Ema([whole], 0.9), Ema(parts, 0.9)
    for step in range(5):
        change = torch.sin(torch.arange(10.0) + step)
        whole += change
        parts[0] += change[:4]
        parts[1] += change[4:]
        one.update(step)
        two.update(step)
    assert torch.equal(torch.cat(two.averages), one.averages[0])


def test_swapped_holds_the_averages_inside_and_the_masters_after_even_on_an_error() -> None:
    master = torch.nn.Parameter(torch.zeros(2))
    ema = Ema([master], 0.5)
    with torch.no_grad():
        master.fill_(4.0)
    with ema.swapped():
        assert master.tolist() == [0.0, 0.0]
    assert master.tolist() == [4.0, 4.0]
    with pytest.raises(RuntimeError, match="inside"), ema.swapped():
        raise RuntimeError("inside")
    assert master.tolist() == [4.0, 4.0]
    assert ema.averages[0].tolist() == [0.0, 0.0]


def test_restart_makes_the_averages_the_masters() -> None:
    master = torch.zeros(2)
    ema = Ema([master], 0.5)
    master.fill_(3.0)
    ema.restart()
    master.fill_(9.0)
    assert ema.averages[0].tolist() == [3.0, 3.0]


def test_decay_zero_keeps_and_swaps_nothing() -> None:
    master = torch.zeros(2)
    ema = Ema([master], 0.0)
    assert ema.averages == []
    master.fill_(1.0)
    ema.update(0)
    with ema.swapped():
        assert master.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("decay", [0.5, 0.0])
def test_exported_holds_the_bases_share_inside_and_the_masters_after_even_on_an_error(decay: float) -> None:
    base, moved = torch.tensor([1.0, 2.0]), torch.tensor([5.0, -2.0])
    master = base.clone()
    ema = Ema([master], decay, base_share=0.25)
    master.copy_(moved)
    ema.update(100)
    average = 0.5 * base + 0.5 * moved if decay else moved
    with pytest.raises(RuntimeError, match="drawing failed"), ema.exported():
        torch.testing.assert_close(master, 0.75 * average + 0.25 * base)
        raise RuntimeError("drawing failed")
    assert torch.equal(master, moved)
    with ema.swapped():
        torch.testing.assert_close(master, average)  # what a checkpoint keeps has no share of the base
    assert ema.changes_export


def test_export_without_a_share_of_the_base_is_the_average() -> None:
    master = torch.zeros(2)
    ema = Ema([master], 0.5)
    master.fill_(3.0)
    ema.update(100)
    with ema.exported():
        assert torch.equal(master, torch.full((2,), 1.5))
    assert torch.equal(master, torch.full((2,), 3.0))
    assert not Ema([master], 0.0).changes_export
