import math
from pathlib import Path
from typing import Any

import pytest

from embedft.base import BaseSpec, load_base
from embedft.causal_lm.data import Message, Row
from embedft.causal_lm.evaluate import answer_bits, compare, evaluate_generation, greedy, tell_of_cuts
from embedft.causal_lm.scores import best_f1, exact_match, text_scores, token_f1
from embedft.causal_lm.template import template_of

ROWS = [
    Row(str(i), (Message("user", text), Message("assistant", "stop")))
    for i, text in enumerate(["what does red mean?", "red", "number 7: what does green mean? " * 3])
]


def test_token_f1_counts_shared_words() -> None:
    assert token_f1("The red hat", "red hat!") == pytest.approx(0.8)
    assert token_f1("", "") == 1.0
    assert token_f1("", "x") == 0.0
    assert token_f1("a a a", "a") == pytest.approx(0.5)
    assert (token_f1("👍", "👎"), token_f1("", "👍"), token_f1("👍 ", "👍")) == (0.0, 0.0, 1.0)


def test_any_of_several_references_is_right() -> None:
    assert exact_match(" go ", ["stop", "go"]) == 1.0
    assert exact_match("went", ["stop", "go"]) == 0.0
    assert best_f1("the red hat", ["a coat", "red hat"]) == pytest.approx(0.8)


def test_bleu_and_chrf_are_sacrebleus() -> None:
    """BLEU by hand: of five words all stand in the reference, and 2 of 4, 1 of 3 pairs and triples, none of the quadruples'
    count is 0, so sacrebleu's exponential smoothing takes half of 1/2."""
    answers = ["red hats are worn here", "it rains"]
    rows, whole = text_scores(answers, [["red hats are here worn", "nothing"], ["it rains"]])
    precisions = [7 / 7, 3 / 5, 1 / 3, (1 / 2) / 2]
    assert whole["bleu"] == pytest.approx(100 * math.prod(precisions) ** 0.25, abs=1e-6)
    assert rows["chrf"][1] == pytest.approx(100)
    assert 0 < rows["chrf"][0] < 100
    assert rows["bleu"][1] == pytest.approx(100)
    assert 0 < whole["chrf"] < 100


def test_text_metrics_are_taken_where_asked_for(tiny_base: Path) -> None:
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    made = {m: evaluate_generation(base.model, template_of(base.tokenizer), ROWS, max_new_tokens=4, metric=m) for m in ("chrf", "token_f1")}
    assert {"bleu", "chrf"} <= set(made["chrf"].metrics)
    assert not {"bleu", "chrf"} & set(made["token_f1"].metrics)
    assert made["chrf"].metrics["chrf"] == made["chrf"].corpus["chrf"]


def test_batched_answers_equal_those_of_one_row_at_a_time(tiny_base: Path) -> None:
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    template = template_of(base.tokenizer)
    batched = greedy(base.model, template, ROWS, max_new_tokens=5, batch=3, max_length=256)
    alone = [greedy(base.model, template, [row], max_new_tokens=5, batch=1, max_length=256)[0] for row in ROWS]
    assert batched == alone
    assert len(set(batched)) > 1


def test_a_bases_own_penalties_change_no_answer_and_its_own_ends_end_one(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    template = template_of(base.tokenizer)
    options: dict[str, Any] = {"max_new_tokens": 6, "batch": 3, "max_length": 256}
    plain = greedy(base.model, template, ROWS, **options)
    monkeypatch.setattr(base.model.generation_config, "repetition_penalty", 9.0)
    monkeypatch.setattr(base.model.generation_config, "no_repeat_ngram_size", 1)
    assert greedy(base.model, template, ROWS, **options) == plain
    first = base.tokenizer(plain[0], add_special_tokens=False)["input_ids"][0]
    monkeypatch.setattr(base.model.generation_config, "eos_token_id", [first])
    assert greedy(base.model, template, ROWS, **options)[0] == ""


def test_bits_are_the_likelihood_of_the_answer_given_the_prompt(tiny_base: Path) -> None:
    import torch

    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    template = template_of(base.tokenizer)
    bits = answer_bits(base.model, template, ROWS, batch=3, max_length=256)
    for row, value in zip(ROWS, bits, strict=True):
        prompt, answer = template.prompt_ids(row), template.answer_ids(row)
        with torch.inference_mode():
            logits = base.model(torch.tensor([prompt + answer])).logits[0].float().log_softmax(-1)
        expected = -sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)) / math.log(2)
        assert value == pytest.approx(expected, rel=1e-3)


def test_prompt_and_answer_stay_within_the_bases_positions(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    template, seen = template_of(base.tokenizer), list[int]()
    forward = base.model.forward

    def watched(*given: Any, **named: Any) -> Any:
        seen.append(int(named["attention_mask"].sum(1).max()))
        return forward(*given, **named)

    monkeypatch.setattr(base.model, "forward", watched)
    monkeypatch.setattr(base.model.config, "max_position_embeddings", 24)
    rows = [
        Row("prompt", (Message("user", "find the note " * 20), Message("assistant", "stop"))),
        Row("answer", (Message("user", "find the note"), Message("assistant", "stop go " * 40))),
    ]
    greedy(base.model, template, rows, max_new_tokens=5, batch=1, max_length=256)
    bits = answer_bits(base.model, template, rows, batch=1, max_length=256)
    assert len(seen) >= 2
    assert max(seen) <= 24
    made = evaluate_generation(base.model, template, rows, max_new_tokens=5)
    assert bits[1] / len(rows[1].answer) < made.scores["bits_per_character"][1] < bits[1]


def test_a_prompt_is_read_however_long_its_answer_may_be(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many tokens to write as the base has positions left nothing of a prompt but its last token."""
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    template, seen = template_of(base.tokenizer), list[list[int]]()
    forward, short, long = base.model.forward, "what does red mean?", "find the note " * 40

    def watched(*given: Any, **named: Any) -> Any:
        seen.append([int(named["input_ids"].shape[1]), int(named["attention_mask"].sum(1).max())])
        return forward(*given, **named)

    monkeypatch.setattr(base.model, "forward", watched)
    monkeypatch.setattr(base.model.config, "max_position_embeddings", 80)
    rows = [Row(text, (Message("user", text), Message("assistant", "stop"))) for text in (short, long)]
    asked = len(template.prompt_ids(rows[0]))
    assert asked < 40
    for row, read in zip(rows, (asked, 40), strict=True):
        seen.clear()
        greedy(base.model, template, [row], max_new_tokens=80, batch=1, max_length=80)
        assert seen[0][0] == read
        assert max(size for _, size in seen) <= 80


def test_an_answer_may_be_as_long_as_what_is_written_and_a_prompt_as_what_is_read(
    tiny_base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    template, row = template_of(base.tokenizer), Row("0", (Message("user", "what does red mean?"), Message("assistant", "stop go")))
    asked, written = len(template.prompt_ids(row)), len(template.answer_ids(row)) - 1
    tell_of_cuts(base.model, template, [row], "x", max_new_tokens=written, max_length=asked)
    assert not capsys.readouterr().err
    tell_of_cuts(base.model, template, [row], "x", max_new_tokens=written - 1, max_length=asked - 1)
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_of_a_prompt_that_is_too_long_its_end_is_kept_where_the_question_stands(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    template, seen = template_of(base.tokenizer), list[list[int]]()
    forward = base.model.forward
    monkeypatch.setattr(base.model, "forward", lambda *a, **named: seen.append(named["input_ids"][0].tolist()) or forward(*a, **named))
    row = Row("0", (Message("user", "find the note " * 20 + "what does red mean?"), Message("assistant", "stop")))
    greedy(base.model, template, [row], max_new_tokens=1, batch=1, max_length=9)
    answer_bits(base.model, template, [row], batch=1, max_length=9)
    end = template.prompt_ids(row)[-9:]
    assert seen == [end, end + template.answer_ids(row)]


def test_bits_a_character_are_of_the_answers_own_characters(tiny_base: Path) -> None:
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    template = template_of(base.tokenizer)
    bits = answer_bits(base.model, template, ROWS, batch=3, max_length=512)
    made = evaluate_generation(base.model, template, ROWS, max_new_tokens=1)
    assert made.scores["bits_per_character"].tolist() == pytest.approx([value / len("stop") for value in bits])


def test_a_gain_is_positive_where_fewer_bits_are_better(tiny_base: Path) -> None:
    base = load_base(BaseSpec(str(tiny_base)), task="causal_lm")
    template = template_of(base.tokenizer)
    worse = evaluate_generation(base.model, template, ROWS * 6, max_new_tokens=1)
    better = type(worse)(worse.ids, worse.answers, {**worse.scores, "bits_per_character": worse.scores["bits_per_character"] - 1})
    low, high = compare(worse, better, "bits_per_character")["gain_ci95"]
    assert (low, high) == (pytest.approx(1.0), pytest.approx(1.0))
