"""A language model in this process: who waits for whom, and who stops."""

import threading
from pathlib import Path
from typing import Any

import pytest

from embedft.adapters.passport import BaseIdentity, Passport
from embedft.base import BaseSpec
from embedft.errors import InputInvalid, UsageError
from embedft.rag.local import LocalReader, spec_of

ASKED = [{"role": "user", "content": "Write a long letter about tea."}]


def in_time(reader: LocalReader, **options: Any) -> str:
    """An answer within a minute, or the test fails instead of hanging."""
    said = list[str]()
    asking = threading.Thread(target=lambda: said.append(reader.chat(ASKED, adapter=None, **options)), daemon=True)
    asking.start()
    asking.join(60)
    assert said, "the next question waits for a stream that nobody reads"
    return said[0]


def test_a_stream_that_nobody_reads_on_holds_up_no_other_question(seed_reader: LocalReader) -> None:
    half = seed_reader.stream(ASKED, adapter=None, max_tokens=6)
    first = next(half)
    whole = in_time(seed_reader, max_tokens=6)
    assert first + "".join(half) == whole


def test_a_stream_that_is_closed_stops_generating(seed_reader: LocalReader) -> None:
    steps = list[None]()
    whole = in_time(seed_reader, max_tokens=48)
    hook = seed_reader._base._model.register_forward_hook(lambda *_: steps.append(None))
    try:
        assert in_time(seed_reader, max_tokens=48) == whole
        needed = len(steps)
        steps.clear()
        half = seed_reader.stream(ASKED, adapter=None, max_tokens=48)
        next(half)
        half.close()
        assert len(steps) < needed
        with pytest.raises(InputInvalid, match="not for a model in this process"):
            in_time_error(seed_reader)
    finally:
        hook.remove()


def test_a_base_that_is_named_is_quantized_as_the_adapter_was_trained_on_it(tmp_path: Path) -> None:
    base = BaseIdentity(model="mine", quantization="nf4", fingerprint="0" * 64)
    Passport(name="a", task="embedding", base=base, method="lora", r=4, alpha=8, max_length=64).write(tmp_path)
    assert spec_of(str(tmp_path), base="models/mine", store=None) == BaseSpec("models/mine", "nf4")
    assert spec_of(None, base="models/mine", store=None) == BaseSpec("models/mine")


def test_a_model_that_writes_no_text_is_no_reader() -> None:
    with pytest.raises(UsageError, match="'minilm' is an encoder"):
        LocalReader(BaseSpec("minilm"))


@pytest.mark.parametrize("count", [-1, 0, 100_000])
def test_an_answer_of_no_length_or_beyond_the_model_is_refused_by_its_length(seed_reader: LocalReader, count: int) -> None:
    with pytest.raises(InputInvalid, match=f"max_tokens {count}: the model has room for"):
        seed_reader.chat(ASKED, adapter=None, max_tokens=count)


def test_a_question_with_half_a_character_is_refused(seed_reader: LocalReader) -> None:
    with pytest.raises(InputInvalid, match="half a character"):
        seed_reader.chat([{"role": "user", "content": "green \udce9"}], adapter=None, max_tokens=2)


def in_time_error(reader: LocalReader) -> None:
    """What goes wrong in the worker is raised to the reader, and the base is free again."""
    list(reader.stream(ASKED, adapter=None, top_p=0.5))
