import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embedft.causal_lm.batches import Collate, LengthGrouped
from embedft.causal_lm.data import Message, Row
from embedft.causal_lm.template import IGNORED, Example, Template, template_of, template_with_hash
from embedft.errors import BaseError, DataError, UsageError
from embedft.model_folder import CHATML, stop_tokens
from tests.fixtures_lm import tiny_tokenizer

ROW = Row("0", (Message("user", "what does red mean?"), Message("assistant", "stop")))
TALK = Row("1", (*ROW.messages, Message("user", "and green?"), Message("assistant", "go")))
THINKING = (  # keeps the reasoning of the last turn alone, as reasoning templates do
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' and loop.last %}think {% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def learnt(example: Example | None, tokenizer: object) -> str:
    assert example is not None
    return tokenizer.decode([label for label in example.labels if label != IGNORED])  # type: ignore[attr-defined]


def rewritten(template: Template, row: Row) -> int:
    example = template.example(row, max_length=128)
    assert example is not None
    return example.rewritten


def test_the_loss_is_on_the_completion_and_its_end_alone() -> None:
    tokenizer = tiny_tokenizer()
    example = template_of(tokenizer).example(ROW, max_length=64)
    assert learnt(example, tokenizer) == "stop<|im_end|>"
    assert example is not None
    assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.ids, strict=True))


def test_train_on_inputs_puts_the_loss_on_all_tokens() -> None:
    example = template_of(tiny_tokenizer()).example(ROW, max_length=64, train_on_inputs=True)
    assert example is not None
    assert example.labels == example.ids


def test_every_answer_of_a_conversation_is_learnt() -> None:
    tokenizer = tiny_tokenizer()
    assert learnt(template_of(tokenizer).example(TALK, max_length=128), tokenizer) == "stop<|im_end|>go<|im_end|>"


def test_an_answer_that_says_so_is_read_and_not_learnt() -> None:
    tokenizer = tiny_tokenizer()
    unlearnt = replace(TALK, messages=tuple(replace(each, learnt=each.content != "stop") for each in TALK.messages))
    example, whole = (template_of(tokenizer).example(row, max_length=128) for row in (unlearnt, TALK))
    assert learnt(example, tokenizer) == "go<|im_end|>"
    assert example is not None
    assert whole is not None
    assert example.ids == whole.ids


def test_a_greeting_that_opens_a_conversation_is_read_and_not_learnt() -> None:
    tokenizer = tiny_tokenizer()
    greeted = Row("2", (Message("assistant", "night"), *ROW.messages))
    example = template_of(tokenizer).example(greeted, max_length=128)
    assert learnt(example, tokenizer) == "stop<|im_end|>"
    assert example is not None
    assert "night" in tokenizer.decode(list(example.ids))


def test_a_conversation_that_the_template_refuses_is_named_with_its_reason() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML
    with pytest.raises(DataError, match=r"row 3 \(system, user\): the chat template refuses it: no system role"):
        template_of(tokenizer).prompt(Row("3", (Message("system", "x"), *ROW.messages)))


def test_of_several_templates_the_default_one_is_the_bases_own() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": THINKING}
    assert template_of(tokenizer).source == CHATML


def test_a_base_whose_tokenizer_ends_nothing_is_refused_rather_than_taught_a_word() -> None:
    tokenizer = tiny_tokenizer(template=False)
    tokenizer.eos_token = None
    with pytest.raises(BaseError, match="no eos_token"):
        template_of(tokenizer).example(ROW, max_length=64)


def test_a_template_that_rewrites_earlier_turns_teaches_the_last_answer_alone() -> None:
    tokenizer = tiny_tokenizer()
    assert rewritten(template_of(tokenizer), TALK) == 0
    tokenizer.chat_template = THINKING
    assert learnt(template_of(tokenizer).example(TALK, max_length=128), tokenizer) == "think go<|im_end|>"
    unlearnt = replace(TALK, messages=tuple(replace(each, learnt=each.content != "stop") for each in TALK.messages))
    greeted = replace(ROW, messages=(Message("assistant", "night"), *ROW.messages))
    assert [rewritten(template_of(tokenizer), row) for row in (TALK, ROW, unlearnt, greeted)] == [1, 0, 0, 0]


def test_training_sees_exactly_the_prompt_tokens_that_a_server_renders() -> None:
    tokenizer = tiny_tokenizer()
    template = template_of(tokenizer)
    served = tokenizer.apply_chat_template([{"role": "user", "content": "what does red mean?"}], add_generation_prompt=True)["input_ids"]
    example = template.example(ROW, max_length=64)
    assert example is not None
    assert template.prompt_ids(ROW) == served
    assert list(example.ids) == served + template.answer_ids(ROW)


@pytest.mark.parametrize("name", ["own", "plain"])
def test_a_space_that_a_tokenizer_puts_before_each_text_is_neither_learnt_nor_seen_between_turns(name: str) -> None:
    """SentencePiece's, as Llama, Mistral and Phi have it."""
    from tokenizers import normalizers

    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Prepend(" ")
    template = template_of(tokenizer, "plain" if name == "plain" else None)
    talk = ROW if name == "plain" else TALK
    example = template.example(talk, max_length=128)
    assert example is not None
    assert learnt(example, tokenizer) == ("stop<|im_end|>" if name == "plain" else "stop<|im_end|>go<|im_end|>")
    assert list(example.ids) == template.prompt_ids(talk) + template.answer_ids(talk)
    if name == "own":
        asked = [{"role": message.role, "content": message.content} for message in TALK.messages[:-1]]
        assert template.prompt_ids(talk) == tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]


def test_an_answer_that_would_share_a_token_with_its_prompt_is_tokenized_apart() -> None:
    tokenizer = tiny_tokenizer(template=False)
    row = Row("2", (Message("user", "what does gre"), Message("assistant", "en mean?")))
    template = template_of(tokenizer)
    example = template.example(row, max_length=64)
    assert example is not None
    assert list(example.ids) == tokenizer("what does gre")["input_ids"] + tokenizer("en mean?<|endoftext|>")["input_ids"]


def test_what_a_template_writes_after_the_end_that_the_bases_folder_names_is_not_learnt(tmp_path: Path) -> None:
    """Phi's turns end in <|end|>, which is no eos of its tokenizer, and a conversation in an eos that stands nowhere between turns."""
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|end|>"], special_tokens=True)
    tokenizer.chat_template = CHATML.replace("im_end", "end") + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    tokenizer.save_pretrained(tmp_path)
    named = {"eos_token_id": [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.get_vocab()["o"]]}
    (tmp_path / "generation_config.json").write_text(json.dumps(named), encoding="utf-8")
    read = AutoTokenizer.from_pretrained(tmp_path)
    assert stop_tokens(read) == sorted(named["eos_token_id"])
    assert learnt(template_of(read).example(TALK, max_length=128), read) == "stop<|end|>go<|end|>"


def test_a_template_that_ends_no_answer_teaches_the_end_of_text_after_the_last() -> None:
    tokenizer = tiny_tokenizer()  # as GLM's, where the next turn ends the one before
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "")
    assert learnt(template_of(tokenizer).example(TALK, max_length=128), tokenizer) == "stop\ngo\n<|im_end|>"


def test_an_answer_that_the_next_turn_ends_is_learnt_with_what_begins_that(tmp_path: Path) -> None:
    """GLM's folder names <|user|> among its ends."""
    from transformers import AutoTokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|assistant|>"], special_tokens=True)
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|user|>")]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}), encoding="utf-8")
    read = AutoTokenizer.from_pretrained(tmp_path)
    template = template_of(read)
    example = template.example(TALK, max_length=128)
    assert learnt(example, read) == "stop<|user|>go<|im_end|>"
    assert example is not None
    assert list(example.ids) == template.prompt_ids(TALK) + template.answer_ids(TALK)


@pytest.mark.parametrize("answer", ["stop", "to what does red mean? [/INST] stop"])
def test_an_answer_is_learnt_as_the_template_writes_it_though_the_system_is_forgotten_once_it_is_answered(answer: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (  # Mistral's way: the system's message stands in the last question, as long as that is the last message
        "{% set system = messages[0].content if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}"
        "{% if m.role == 'user' %}[INST] {% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
        "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    template = template_of(tokenizer)
    for before in (ROW.messages[:1], TALK.messages[:3]):
        row = Row("0", (Message("system", "be brief"), *before, Message("assistant", answer)))
        assert "be brief" in template.prompt(row)
        assert learnt(template.example(row, max_length=128), tokenizer) == f" {answer}<|im_end|>"


@pytest.mark.parametrize("answer", ["<think>\nred</think>\n\nstop", "red</think>\n\nstop"])
def test_a_thought_that_the_prompt_opens_is_opened_once(answer: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (  # DeepSeek-R1's way: thoughts are asked for, and left out of what was answered
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    row = Row("0", (*ROW.messages[:1], Message("assistant", answer)))
    template = template_of(tokenizer)
    assert template.prompt(row).endswith("<think>\n")
    assert learnt(template.example(row, max_length=128), tokenizer) == "red</think>\n\nstop<|im_end|>"


def test_an_answer_that_speaks_of_its_end_is_learnt_whole() -> None:
    tokenizer = tiny_tokenizer()
    row = Row("0", (*ROW.messages[:1], Message("assistant", "a <|im_end|> b")))
    assert learnt(template_of(tokenizer).example(row, max_length=128), tokenizer) == "a <|im_end|> b<|im_end|>"


def test_what_a_tokenizer_begins_a_text_with_stands_there_once() -> None:
    """A chat template writes it itself; plain text gets it from the tokenizer, before the prompt and not before the answer."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    begin = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $0", special_tokens=[("<|endoftext|>", begin)])
    for name in ("chatml", "plain"):
        template = template_of(tokenizer, name)
        example = template.example(ROW, max_length=64)
        assert example is not None
        assert list(example.ids) == template.prompt_ids(ROW) + template.answer_ids(ROW)
        assert (example.ids.count(begin), example.ids[0] == begin) == ((1, True) if name == "plain" else (0, False))


def test_a_base_without_a_template_learns_prompt_then_completion_then_end() -> None:
    tokenizer = tiny_tokenizer(template=False)
    template = template_of(tokenizer)
    example = template.example(ROW, max_length=64)
    assert example is not None
    assert tokenizer.decode(list(example.ids)) == "what does red mean?stop<|endoftext|>"
    with pytest.raises(UsageError, match=r"data\.template=chatml"):
        template.example(TALK, max_length=64)
    assert learnt(template_of(tokenizer, "chatml").example(ROW, max_length=64), tokenizer).startswith("stop")


def test_a_template_is_found_again_by_its_hash_and_a_foreign_one_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    for name in (None, "chatml", "plain"):
        template = template_of(tokenizer, name)
        assert template_with_hash(tokenizer, template.hash).source == template.source
    with pytest.raises(UsageError, match="does not have"):
        template_with_hash(tokenizer, "0" * 64)
    with pytest.raises(UsageError, match="no template 'llama9'"):
        template_of(tokenizer, "llama9")


def test_long_rows_are_cut_and_rows_without_room_for_an_answer_dropped() -> None:
    template = template_of(tiny_tokenizer())
    whole = template.example(ROW, max_length=64)
    assert whole is not None
    shorter = template.example(ROW, max_length=len(whole.ids) - 1)
    assert shorter is not None
    assert shorter.ids == whole.ids[:-1]
    assert template.example(ROW, max_length=len(template.prompt_ids(ROW))) is None


def test_a_batch_keeps_logits_for_the_learnt_tail_alone_and_loses_no_label() -> None:

    examples = [Example((1, 2, 3, 4), (IGNORED, IGNORED, 3, 4)), Example((5, 6), (IGNORED, 6))]
    batch = Collate(pad_id=0, dtype=torch.float32)(examples)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4], [0, 0, 5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]
    assert batch["logits_to_keep"] == 3
    assert batch["labels"].tolist() == [[IGNORED, 3, 4], [IGNORED, IGNORED, 6]]
    assert torch.equal(batch["labels"], batch["labels"].clamp(min=IGNORED))


def test_the_order_is_a_permutation_of_like_lengths_that_depends_on_seed_and_epoch_alone() -> None:
    lengths = [(7 * i) % 50 + 1 for i in range(203)]
    sampler = LengthGrouped(lengths, batch=8, seed=3)
    first, again = list(sampler), list(LengthGrouped(lengths, batch=8, seed=3))
    sampler.set_epoch(1)
    assert first == again
    assert list(sampler) != first
    assert sorted(first) == list(range(203))
    spread = [max(lengths[i] for i in first[s : s + 8]) - min(lengths[i] for i in first[s : s + 8]) for s in range(0, 200, 8)]
    assert max(spread) <= 4


def test_the_end_of_a_turn_stops_an_answer() -> None:
    tokenizer = tiny_tokenizer()
    assert stop_tokens(tokenizer) == [tokenizer.convert_tokens_to_ids("<|im_end|>")]
    turns = ["<|eot_id|>", "<end_of_turn>"]  # Llama's and Gemma's, beside an eos of another name
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    assert set(stop_tokens(tokenizer)) == set(tokenizer.convert_tokens_to_ids(["<|im_end|>", *turns]))


def test_a_base_folder_says_which_template_an_engine_will_render_by(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from embedft.model_folder import own_template, template_hash
    from tests.fixtures_lm import tiny_llama

    for template in (True, False):
        folder = tiny_llama(tmp_path / str(template), template=template, layers=1)
        assert template_hash(own_template(folder)) == template_of(AutoTokenizer.from_pretrained(folder)).hash


def test_a_template_that_cannot_be_read_is_no_fault_of_a_row_and_one_that_stumbles_names_it() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content "
    with pytest.raises(BaseError, match=r"cannot be read: .*\(line 1\)"):
        template_of(tokenizer).prompt(ROW)
    tokenizer.chat_template = "{{ messages[0].content + 1 }}"
    with pytest.raises(DataError, match=r"row 0 .* refuses it: can only concatenate"):
        template_of(tokenizer).prompt(ROW)
