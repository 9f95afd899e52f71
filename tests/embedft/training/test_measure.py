import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from embedft.recipe import TrainSection
from embedft.steady import steady
from embedft.training.arguments import hf_arguments, steps_an_epoch
from embedft.training.measure import PeakMemory, trainable
from embedft.training.progress import ProgressETA


def test_peak_memory_sees_what_was_freed_again() -> None:
    import mmap
    import time

    with PeakMemory() as peak:
        block = mmap.mmap(-1, 40_000_000)  # pages of its own: an allocator may hand out memory that it never gave back
        block.write(b"x" * 40_000_000)
        time.sleep(0.1)
        block.close()
    assert 35_000_000 < peak.bytes < 500_000_000


def test_a_second_block_is_not_served_unseen_from_what_the_first_one_freed() -> None:
    import time

    with steady():
        for _ in range(2):
            with PeakMemory() as peak:
                block = [bytes(range(256)) * 4096 for _ in range(40)]  # 40 MiB, in pieces that the heap keeps when they are freed
                time.sleep(0.1)
                del block
            assert 35_000_000 < peak.bytes < 500_000_000


def test_trainable_counts_a_packed_weight_by_its_elements() -> None:
    import torch

    model = torch.nn.Linear(8, 4, bias=False)
    packed: Any = torch.nn.Parameter(torch.zeros(16, 1, dtype=torch.uint8), requires_grad=False)  # 32 four-bit weights
    packed.quant_state = SimpleNamespace(shape=torch.Size([4, 8]))
    model.register_parameter("packed", packed)
    size = trainable(model)
    assert size.count == 32
    assert size.percent == pytest.approx(50.0)


def test_settings_reach_transformers_in_its_own_terms(tmp_path: Any) -> None:
    from transformers import TrainingArguments

    train = TrainSection(epochs=3, batch=8, accumulate=2, lr=1e-3, warmup=0.1, schedule="constant", checkpoint_every=7, seed=8)
    train = train.model_copy(update={"weight_decay": 0.1, "max_grad_norm": 0.3})
    steps = steps_an_epoch(100, train)
    assert steps == 7  # 13 batches, two a step
    arguments = TrainingArguments(**hf_arguments(train, output_dir=tmp_path, steps_per_epoch=steps))
    assert arguments.warmup_steps == 3  # a tenth of 21, rounded up
    assert (arguments.save_steps, str(arguments.save_strategy.value)) == (7, "steps")
    assert arguments.lr_scheduler_type.value == "constant_with_warmup"
    assert arguments.report_to == []
    assert arguments.data_seed == arguments.seed == 8
    assert (arguments.learning_rate, arguments.weight_decay, arguments.max_grad_norm) == (1e-3, 0.1, 0.3)
    assert (arguments.num_train_epochs, arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 8, 2)


def test_progress_goes_to_stderr_with_loss_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    state = SimpleNamespace(global_step=0, max_steps=4)
    for enabled in (False, True):
        progress = ProgressETA("colours", enabled=enabled)
        progress.every = 0.0
        progress.on_train_begin(None, state, None)
        progress.on_log(None, state, None, logs={"loss": 1.25})
        progress.on_step_end(None, SimpleNamespace(global_step=1, max_steps=4), None)
    assert stream.getvalue() == "colours  step 1/4  loss 1.250  0:00 left\n"
    assert progress.line(2, 4, 100.0) == "colours  step 2/4  loss 1.250  1:40 left"
