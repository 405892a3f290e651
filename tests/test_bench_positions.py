"""The bench of position policies: where the history fits all agree, beyond they do not, and damping is the average of the turned key."""
import json
import sys

import pytest
import torch

import bench.positions as positions
from megacontext.span import Span
from megacontext.tree import MegaTree, make_header
from nanochat.attention import rope_angles, rotate
from tests.test_runtime import some_ids
from tests.tiny import tiny_networks
from tests.tiny_run import make_run, make_text


def test_the_policies_agree_until_the_history_outgrows_them(base, tmp_path, monkeypatch, capsys):
    make_run("sft")
    monkeypatch.setattr(sys, "argv", ["positions", "--device", "cpu", "--source", make_text(tmp_path / "text", files=200), "--times", "1,8", "--budget", "192",
                                      "--read", "40", "--places", "2", "--seeds", "2"])
    positions.main()
    out = capsys.readouterr().out
    told = json.loads(out.splitlines()[-1])
    numbers, near, far = told["numbers"], told["trained"], 8 * told["trained"]
    assert set(numbers) == {f"{policy}{damped}/{length}" for policy in ("absolute", "clamped", "compressed") for damped in ("", ", damped") for length in (near, far)}
    assert all(abs(numbers[f"{policy}/{far}"]["more"]["mean"]) > 1e-5 for policy in ("absolute", "clamped"))
    assert abs(numbers[f"compressed, damped/{far}"]["more"]["mean"]) > 1e-5 and numbers[f"compressed/{far}"]["more"] == {"mean": 0, "spread": 0}
    assert f"| {far:,} | compressed | {positions.pm(numbers[f'compressed/{far}']['nats'], 4)} |" in out


@pytest.mark.parametrize("level", [1, 2])
def test_a_damped_key_is_the_mean_of_the_turned_keys(level):
    """The Gaussian against what it stands for: the key turned to every place of the stretch, averaged, and turned back from its centre."""
    networks = tiny_networks(seq_len=8192)
    plain, damped = (kind(*networks, MegaTree.in_memory(make_header(32, 0, "float32")), 192, n_diff=0) for kind in (positions.Session, positions.Damped))
    for session in (plain, damped):
        session.feed(some_ids(6000))
    span = next(span for span in plain.spans if span.level == level)
    k, blurred = (session.shown.pairs()[span][0] for session in (plain, damped))
    offsets = torch.arange(span.width) - (span.width - 1) / 2
    mean = rotate(k, *rope_angles(offsets[None], k.size(-1))).mean(dim=2, keepdim=True) # (L, H, width, d) averaged over the places
    slow = torch.arange(k.size(-1)) % (k.size(-1) // 2) >= 4 # pairs that turn by less than a circle over the stretch: there a Gaussian is a good stand-in
    assert torch.allclose(mean[..., slow], blurred[..., slow], atol=0.05 * k.abs().max())
    assert torch.equal(plain.shown.pairs()[Span(0, 186)][0][0], damped.shown.pairs()[Span(0, 186)][0][0]), "keys of tokens are not damped"
