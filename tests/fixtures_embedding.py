"""Tiny random retrieval bases and a task they can learn: a query in one made-up language, its document in another."""

import json
import random
from itertools import permutations
from pathlib import Path
from typing import Any

TOPICS = 16
WORDS = 5  # each topic has so many words in either language
LETTERS = "bdfgklmnprst"


def words(language: str) -> list[list[str]]:
    """Topic → its words in one of the two languages ('query' or 'document'); always the same."""
    generator = random.Random(language)
    made = ["".join(generator.choice(LETTERS) + generator.choice("aeiou") for _ in range(3)) for _ in range(TOPICS * WORDS)]
    return [made[topic * WORDS : (topic + 1) * WORDS] for topic in range(TOPICS)]


def text(language: str, topic: int, seed: int) -> str:
    """Three of the topic's words in an order that differs between any 60 seeds in steps of TOPICS."""
    orders = list(permutations(words(language)[topic], 3))
    return " ".join(orders[seed // TOPICS * 7 % len(orders)])


def planted_rows(count: int, *, start: int = 0, shuffled: bool = False) -> list[dict[str, str]]:
    """Pairs of one topic each, all with that topic's one document; `shuffled` breaks the link between query and document."""
    topics = [i % TOPICS for i in range(count)]
    others = random.Random(0).sample(topics, count) if shuffled else topics
    return [
        {"query": text("query", topic, start + i), "document": text("document", other, -1)}
        for i, (topic, other) in enumerate(zip(topics, others, strict=True))
    ]


def another(index: int) -> int:
    """A number of another topic than `index`'s; over the numbers each topic meets all the others."""
    return index // TOPICS * TOPICS + (index % TOPICS + 1 + index // TOPICS % (TOPICS - 1)) % TOPICS


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def write_beir(folder: Path, *, train: int = 96, test: int = 32) -> str:
    """A BEIR folder: one document a topic; `test` queries that training never shows."""
    (folder / "qrels").mkdir(parents=True)
    write_rows(folder / "corpus.jsonl", [{"_id": f"d{t}", "title": "", "text": text("document", t, -1)} for t in range(TOPICS)])
    count = train + test
    write_rows(folder / "queries.jsonl", [{"_id": f"q{i}", "text": text("query", i % TOPICS, i)} for i in range(count)])
    for split, numbers in (("train", range(train)), ("test", range(train, count))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{i}\td{i % TOPICS}\t1" for i in numbers)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder)


def tiny_encoder(folder: Path, *, pooling: str, normalize: bool = True) -> Path:
    """A random 2-layer BERT (hidden 64) whose tokenizer knows both languages; [CLS] … [SEP] around each text."""
    import torch
    from transformers import BertConfig, BertModel

    tokenizer = _tokenizer(["[CLS]", "[SEP]"], "[CLS] $0 [SEP]")
    torch.manual_seed(len(pooling))
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    BertModel(config).save_pretrained(folder)
    return _finish(folder, tokenizer, pooling, normalize)


def tiny_decoder(folder: Path) -> Path:
    """A random 2-layer Llama (hidden 128, heads of 64), last-token pooled; its tokenizer adds only <s> in front."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer(["<s>", "</s>"], "<s> $0")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return _finish(folder, tokenizer, "lasttoken", True)


def disagree(folder: Path) -> None:
    """Of a base's two tokenizer files one makes it a class of transformers that lower-cases, and the other does not."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "BertTokenizer", "do_lower_case": True}))


def _finish(folder: Path, tokenizer: Any, pooling: Any, normalize: bool) -> Path:
    from embedft.encode import EncodeSettings
    from embedft.training.sentence_files import write_sentence_files

    size = json.loads((folder / "config.json").read_text())["hidden_size"]
    write_sentence_files(folder, tokenizer, EncodeSettings(pooling, normalize, 32), dimension=size)
    return folder


def _tokenizer(special: list[str], template: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = [word for language in ("query", "document") for topic in words(language) for word in topic]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(["[PAD]", "[UNK]", *special, "find", ":", *known]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in special if token in template]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=64)
