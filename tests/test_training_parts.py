"""Parts of training that a whole run does not show: bfloat16 weights, bytes for moments, sheets."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from training_driver import add_minute_model

from mirage_hello.model import checkpoint
from mirage_hello.model.capture import Captured
from mirage_hello.model.data.raycast_triton import refusal
from mirage_hello.model.presets import PRESETS, build
from mirage_hello.model.training import Options, TrainingError, preset, train
from mirage_hello.model.training import state as states
from mirage_hello.model.training.config import changed
from mirage_hello.model.training.distill_stage import DistillStage
from mirage_hello.model.training.journal import read as read_metrics
from mirage_hello.model.training.optimise import Optimiser
from mirage_hello.model.training.parallel import Workers
from mirage_hello.model.training.place import Place
from mirage_hello.model.training.samples import sheet, write_decoded

QUICK = {"model": "minute", "size": 16, "clip_frames": 4, "autoencoder_steps": 2}


@pytest.fixture(autouse=True)
def minute_model():
    add_minute_model()
    yield
    PRESETS.pop("minute")


def test_bfloat16_weights_are_the_rounded_ones_of_the_optimiser():
    torch.manual_seed(0)
    module, whole = nn.Linear(4, 4), nn.Linear(4, 4)
    whole.load_state_dict(module.state_dict())
    config = changed(preset("smoke"), {"warmup": 1})
    half, full = Optimiser(module, config, 1e-4, half=True), Optimiser(whole, config, 1e-4)
    for _ in range(20):
        x = torch.randn(8, 4)
        half.step(module(x.bfloat16()).float().square().mean(), 0.0)
        full.step(whole(x).square().mean(), 0.0)
    assert module.weight.dtype == torch.bfloat16 and half.weights[0].dtype == torch.float32
    assert torch.equal(module.weight, half.weights[0].bfloat16())
    # Steps of 1e-4 are below bfloat16's resolution at 0.5 (2e-3): only float32 sums them.
    torch.testing.assert_close(half.weights[0], whole.weight, atol=4e-4, rtol=0)
    half.use_average()
    assert module.weight.dtype == torch.float32 and torch.equal(module.weight, half.average[0])


def test_a_run_in_bfloat16_resumes_exactly(tmp_path):
    values = {**QUICK, "precision": "bf16", "video_steps": 7, "checkpoint_every": 4, "keep": 9}
    config, options = changed(preset("smoke"), values), Options(device="cpu", quiet=True)
    train(config, tmp_path / "whole", options)
    part = tmp_path / "part" / "checkpoints"
    part.mkdir(parents=True)
    shutil.copy(tmp_path / "whole" / "checkpoints" / "1-video-00000004.pt", part)
    options.resume = True
    train(config, tmp_path / "part", options)
    whole, again = (
        {(r["stage"], r["step"]): r["loss"] for r in read_metrics(tmp_path / name)}
        for name in ("whole", "part")
    )
    assert min(again) == ("distill", 0) and ("video", 4) in again and ("video", 3) not in again
    assert again == {key: whole[key] for key in again}


def test_moments_survive_as_bytes(seed):
    torch.manual_seed(seed)
    moment = torch.randn(300, 40).square() * 10.0 ** torch.randint(-6, 1, (300, 40))
    moment[0, 0] = 0
    codes, peak = states.packed(moment)
    assert codes.dtype == torch.uint8 and codes.shape == moment.shape
    back = states.unpacked(codes, peak)
    kept = codes > 0
    ratio = back[kept] / moment[kept]
    assert ratio.min() > 0.956 and ratio.max() < 1.045  # half a step of 2^(1/8)
    assert back[0, 0] == 0 and moment[~kept].max() < 1e-9 * moment.max()


def test_bodies_are_called_where_there_are_no_graphs():
    run = Captured(torch.device("cpu"), torch.Generator())
    calls = []
    for number in range(7):
        metrics, batch = run(number % 2, lambda n=number: (calls.append(n), ({"n": n}, {}))[1])
        assert metrics == {"n": number} and batch == {}
    assert calls == list(range(7))


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_distillation_ends_with_a_mean_of_weights(share):
    config = changed(preset("smoke"), {**QUICK, "student_share": share})
    denoiser, autoencoder = build("minute")
    before = [p.detach().clone() for p in denoiser.parameters()]
    stage = DistillStage(config, denoiser, autoencoder, Workers(config, "cpu"))
    stage.start()
    stage.step(0, 0.0)
    student = [average.clone() for average in stage.optimiser.average]
    assert any(not torch.equal(a, b) for a, b in zip(before, student, strict=True))
    stage.finish()
    for weight, teacher, own in zip(denoiser.parameters(), before, student, strict=True):
        torch.testing.assert_close(weight.detach(), share * own + (1 - share) * teacher)


def test_graphs_go_before_their_group(monkeypatch):
    """NCCL's communicators wait in their end for graphs that hold their collectives."""
    workers = Workers(preset("smoke"), "cpu")
    run = workers.graphs(torch.Generator(), preset("smoke"), half=True)
    order = []
    run.graphs["step"] = (SimpleNamespace(reset=lambda: order.append("graph")), {}, {})
    monkeypatch.setattr(workers, "ranks", 2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: order.append("group"))
    workers.close()
    assert order == ["wait", "graph", "group"] and not run.graphs
    del run
    assert not workers.captured  # a stage that is over keeps no memory


def test_the_ray_kernel_is_refused_with_its_reason():
    reason = refusal(torch.device("cpu"))
    assert reason is not None and ": " in reason


def test_sheets(tmp_path):
    frames = torch.zeros(2, 3, 8, 8)
    picture = sheet([frames - 1, frames, frames + 1])
    assert picture.shape == (16, 24, 3) and picture[0, ::8, 0].tolist() == [0, 128, 255]
    _, autoencoder = build("minute")
    pixels = torch.randint(0, 256, (30, 3, 16, 16), dtype=torch.uint8)
    write_decoded(tmp_path / "a" / "decoded", autoencoder, pixels)
    assert (tmp_path / "a" / "decoded.png").read_bytes()[:4] == b"\x89PNG"


def test_a_resumed_run_does_not_need_the_file_it_began_with(tmp_path):
    """Its checkpoints hold every weight; only the first stage's compact form lacks the denoiser."""
    options = Options(device="cpu", quiet=True)
    config = changed(preset("smoke"), {**QUICK, "video_steps": 2, "distill_steps": 0})
    config = changed(config, {"checkpoint_every": 1, "keep": 9})
    train(config, tmp_path / "a", options)
    first = (tmp_path / "a" / "model.safetensors").rename(tmp_path / "first.safetensors")
    config = changed(config, {"start": str(first), "seed": 7})
    train(config, tmp_path / "b", options)
    whole = checkpoint.load(tmp_path / "b" / "model.safetensors")[0].state_dict()
    for path in states.checkpoints(tmp_path / "b" / "checkpoints")[1:]:
        path.unlink()
    first.rename(tmp_path / "moved")
    train(config, tmp_path / "b", Options(device="cpu", quiet=True, resume=True))
    resumed = checkpoint.load(tmp_path / "b" / "model.safetensors")[0].state_dict()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)

    compact = Options(device="cpu", quiet=True, compact=tmp_path / "compact")
    train(changed(config, {"start": "", "video_steps": 0}), tmp_path / "c", compact)
    again = Options(device="cpu", quiet=True, resume_from=tmp_path / "compact")
    with pytest.raises(TrainingError, match=r"config: start=.*no file"):
        Place(config, tmp_path / "d", again)
    (tmp_path / "moved").rename(first)
    place, saved = Place(config, tmp_path / "e", again), checkpoint.load(first)[0].state_dict()
    assert place.stage_number == 1
    assert all(torch.equal(t, saved[n]) for n, t in place.denoiser.state_dict().items())
