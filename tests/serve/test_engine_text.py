"""How the peft engine chooses tokens and tells their text: sampling, offsets, pieces of text, stop strings."""

from collections.abc import Callable
from typing import Any

import pytest
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from serve.engines.peft.answers import Answers, Piece
from serve.engines.peft.sampling import Sampling, TokenLogprobs, adjusted, choose, token_logprobs
from serve.engines.peft.text import Detokenizer
from tests.fixtures_lm import tiny_tokenizer


def test_top_p_keeps_the_fewest_tokens_that_reach_it() -> None:
    logits = torch.log(torch.tensor([0.5, 0.3, 0.15, 0.05]))
    generator = torch.Generator().manual_seed(0)
    drawn = {choose(logits, Sampling(1, top_p=0.6), generator) for _ in range(200)}
    assert drawn == {0, 1}
    assert choose(logits, Sampling(1, temperature=0), None) == 0
    assert (entry := token_logprobs(logits, 1, 2)).rank == 2
    assert [token for token, _ in entry.top] == [0, 1]


def test_top_p_counts_what_top_k_left() -> None:
    logits, generator = torch.log(torch.tensor([0.3, 0.25, 0.2, 0.15, 0.1])), torch.Generator().manual_seed(0)
    assert {choose(logits, Sampling(1, top_k=2, top_p=0.5), generator) for _ in range(200)} == {0}
    assert {choose(logits, Sampling(1, top_k=2, top_p=0.6), generator) for _ in range(200)} == {0, 1}


@pytest.mark.parametrize("top_p", [5e-324, 1e-300, 1e-9])
def test_the_likeliest_token_reaches_any_top_p(top_p: float) -> None:
    logits, generator = torch.log(torch.tensor([0.3, 0.5, 0.2])), torch.Generator().manual_seed(0)
    assert {choose(logits, Sampling(1, top_p=top_p), generator) for _ in range(20)} == {1}


def test_the_coldest_temperature_is_the_likeliest_token() -> None:
    for temperature in (1e-45, 1e-40, 1e-5):
        assert choose(torch.tensor([3.0, 9.0, 1.0]), Sampling(1, temperature=temperature), torch.Generator()) == 1


def test_min_p_keeps_what_is_likely_beside_the_likeliest_and_top_p_counts_what_is_left() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.1]))
    generator = torch.Generator().manual_seed(0)
    assert {choose(logits, Sampling(1, min_p=0.45), generator) for _ in range(300)} == {0, 1, 2}
    assert {choose(logits, Sampling(1, min_p=0.6), generator) for _ in range(300)} == {0, 1}
    assert {choose(logits, Sampling(1, min_p=0.6, top_p=0.5), generator) for _ in range(300)} == {0}  # 0.4 of 0.7 is more than half
    assert {choose(logits, Sampling(1, min_p=1.0, temperature=5.0), generator) for _ in range(300)} == {0}


def test_a_bias_is_added_before_the_penalties() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    sampling = Sampling(1, logit_bias=((3, 4.0), (0, -100.0)), repetition_penalty=2.0)
    assert adjusted(logits, sampling, prompt=[3], tokens=[]).tolist() == [-98.0, 1.0, 0.0, 1.5]
    assert logits.tolist() == [2.0, 1.0, 0.0, -1.0]  # what is reported as log-probabilities stays the model's


def test_offsets_of_a_streamed_answers_tokens_go_on_from_piece_to_piece() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("red is a colour")["input_ids"]
    told = [TokenLogprobs(token, -0.5, 1, ()) for token in ids]

    def shapes() -> Answers:
        return Answers("text_completion", "base", tokenizer, [[1]], n=2, ids=False)

    whole = shapes().whole([Piece(0, logprobs=list(told)), Piece(1, logprobs=list(told))])
    expected = whole["choices"][1]["logprobs"]["text_offset"]
    assert expected == [len(tokenizer.decode(ids[:count])) for count in range(len(ids))]
    streamed, offsets = shapes(), list[int]()
    for one in told:
        streamed.chunk(Piece(0, logprobs=[one, one]))
        offsets += streamed.chunk(Piece(1, logprobs=[one]))["choices"][0]["logprobs"]["text_offset"]
    assert offsets == expected


def test_text_never_ends_inside_a_character_or_a_stop_string() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("a € sign, then END of it")["input_ids"]
    detokenizer = Detokenizer(tokenizer, ("END",))
    told, stopped = "", False
    for token in ids:
        piece, stopped = detokenizer.feed(token, last=False)
        told += piece
        assert "\ufffd" not in told
        assert not told.endswith(("E", "EN"))
        if stopped:
            break
    assert stopped
    assert told == "a € sign, then "


def test_a_stop_string_ends_nothing_before_the_least_tokens() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("END one END")["input_ids"]
    early = len(tokenizer("END one")["input_ids"])
    for least in (0, early, len(ids)):
        detokenizer, told, stopped = Detokenizer(tokenizer, ("END",), least=least), "", False
        for token in ids:
            if stopped:
                break
            piece, stopped = detokenizer.feed(token, last=False)
            told += piece
        assert (told, stopped) == {0: ("", True), early: ("END one ", True), len(ids): ("END one END", False)}[least]


def metaspace_tokenizer() -> Any:
    """As a Llama's of old: a space stands before each word, and the first is not part of the text."""
    words = ["<s>", "▁say", "▁no", "where", "▁", "s", "▁€", "<0xE2>", "<0x82>", "<0xAC>"]
    model = tokenizers.models.BPE(vocab={word: place for place, word in enumerate(words)}, merges=[], byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


EURO_OF_BYTES = (7, 8, 9)  # where one byte is wrong, HF's decoder gives up those that stand beside it as well


@pytest.mark.parametrize(("made", "units"), [(tiny_tokenizer, 400), (metaspace_tokenizer, 8)])
@given(data=st.data())
def test_pieces_of_text_are_what_all_tokens_are_decoded_to(made: Callable[[], Any], units: int, data: st.DataObject) -> None:
    tokenizer, drawn = made(), data.draw(st.lists(st.integers(0, units - 1), min_size=1, max_size=30))
    ids = [token for unit in drawn for token in (EURO_OF_BYTES if (made, unit) == (metaspace_tokenizer, 7) else (unit,))]
    detokenizer = Detokenizer(tokenizer, ())
    told = "".join(detokenizer.feed(token, last=place == len(ids) - 1)[0] for place, token in enumerate(ids))
    assert told == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_long_answer_is_not_decoded_whole_for_every_token() -> None:
    tokenizer, lengths = tiny_tokenizer(), list[int]()

    class Counted:
        def decode(self, ids: list[int], **more: Any) -> str:
            lengths.append(len(ids))
            return str(tokenizer.decode(ids, **more))

    detokenizer = Detokenizer(Counted(), ("never",))
    for token in tokenizer("one more word € " * 60)["input_ids"]:
        detokenizer.feed(token, last=False)
    assert max(lengths) < 12
