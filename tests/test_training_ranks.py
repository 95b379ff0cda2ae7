"""Several processes: they train together, and end with a sentence where one is lost."""

import math
import multiprocessing

import pytest
import torch
from training_driver import Fault, add_minute_model, free_port, losses, quick, replica, start

from mirage_hello.model import checkpoint
from mirage_hello.model.presets import PRESETS
from mirage_hello.model.training import Options, TrainingError, train
from mirage_hello.model.training import state as states


@pytest.fixture(autouse=True)
def minute_model():
    add_minute_model()
    yield
    PRESETS.pop("minute")


@pytest.mark.parametrize(
    ("parallel", "precision"), [("ddp", "fp32"), ("ddp", "bf16"), ("fsdp", "fp32")]
)
def test_two_processes_train_together(tmp_path, parallel, precision):
    config = quick(
        video_steps=4, checkpoint_every=3, parallel=parallel, precision=precision, keep=9
    )
    options = Options(device="cpu", quiet=True)
    codes, texts = start(config, tmp_path, options, ranks=2).finish()
    assert codes == [0, 0], texts
    curve = losses(tmp_path)
    assert len(curve) == 2 + 4 + 1 and all(math.isfinite(v) for v in curve.values())
    denoiser, _ = checkpoint.load(tmp_path / "model.safetensors")
    assert all(torch.isfinite(p).all() for p in denoiser.parameters())
    for path in states.checkpoints(tmp_path / "checkpoints"):
        if path.name != "1-video-00000003.pt":
            path.unlink()
    options.resume = True
    with pytest.raises(TrainingError, match=r"written by 2 processes .* resume with as many"):
        train(config, tmp_path, options)


@pytest.mark.gpu
@pytest.mark.parametrize(("parallel", "precision"), [("ddp", "bf16"), ("fsdp", "bf16")])
def test_two_gpus_train_together_and_end(tmp_path, parallel, precision):
    """The steps of replicas are graphs with NCCL's sums inside, which must go before its group."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    config = quick(
        autoencoder_steps=14, video_steps=14, distill_steps=12, parallel=parallel,
        precision=precision, size=32, clip_frames=6,
    )  # fmt: skip
    codes, texts = start(config, tmp_path, Options(quiet=True), ranks=2).finish()
    assert codes == [0, 0], texts
    curve = losses(tmp_path)
    assert len(curve) == 14 + 14 + 12 and all(math.isfinite(v) for v in curve.values())
    denoiser, _ = checkpoint.load(tmp_path / "model.safetensors")
    assert all(torch.isfinite(p).all() for p in denoiser.parameters())


def test_replicas_in_half_precision_step_as_one_with_the_mean_gradient(tmp_path):
    config = quick(precision="bf16", warmup=1, ema=0.5)
    context = multiprocessing.get_context("forkserver")
    for ranks in (1, 2):
        port, processes = free_port(), []
        for rank in range(ranks):
            arguments = (rank, ranks, port, tmp_path / f"{rank}-of-{ranks}.pt", config)
            processes.append(context.Process(target=replica, args=arguments))
            processes[-1].start()
        for process in processes:
            process.join(60)
            assert process.exitcode == 0
    alone, first, second = (
        torch.load(tmp_path / f"{n}.pt") for n in ("0-of-1", "0-of-2", "1-of-2")
    )
    for one, two, three in zip(alone, first, second, strict=True):
        assert torch.equal(two, three)
        assert torch.allclose(one, two, rtol=1e-2, atol=1e-3)


def test_a_lost_rank_is_one_sentence_and_the_run_goes_on_exactly(tmp_path):
    config = quick(
        autoencoder_steps=0, distill_steps=0, video_steps=6, checkpoint_every=3, parallel="fsdp",
        rank_timeout_s=6,
    )  # fmt: skip
    options = Options(device="cpu", quiet=True)
    codes, texts = start(config, tmp_path / "whole", options, ranks=2).finish()
    assert codes == [0, 0], texts
    lost = start(config, tmp_path / "lost", options, ranks=2, fault=Fault(die_at=4))
    codes, texts = lost.finish()
    assert codes == [2, 9], texts
    assert "another rank was lost at step 4" in texts[0]
    assert "1-video-00000003.pt; start all ranks again with --resume" in texts[0]
    options.resume = True
    codes, texts = start(config, tmp_path / "lost", options, ranks=2).finish()
    assert codes == [0, 0], texts
    whole, again = losses(tmp_path / "whole"), losses(tmp_path / "lost")
    assert again.keys() == whole.keys()
    for key, value in whole.items():
        assert again[key] == pytest.approx(value, rel=1e-4), key


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_two_processes_go_on_from_the_compact_state_of_one(tmp_path, precision):
    """As a run that began on one GPU goes on with two: each rank renders clips of its own."""
    config = quick(video_steps=16, distill_steps=0, checkpoint_every=4, keep=9, precision=precision)
    options = Options(device="cpu", quiet=True, compact=tmp_path / "small", minutes=1e-9)
    assert not train(config, tmp_path / "one", options)
    options = Options(device="cpu", quiet=True, resume_from=tmp_path / "small")
    codes, texts = start(config, tmp_path / "two", options, ranks=2).finish()
    assert codes == [0, 0], texts
    steps = [step for stage, step in losses(tmp_path / "two") if stage == "video"]
    assert steps == list(range(10, 16))
    newest = torch.load(tmp_path / "two" / "checkpoints" / "1-video-00000012.pt")
    first, second = (rank["streams"]["history"] for rank in newest["ranks"])
    assert first.abs().sum() > 0 and not torch.equal(first, second)
