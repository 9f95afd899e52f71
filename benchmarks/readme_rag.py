"""The README's figures of questions over documents, from rag.json."""

from typing import Any

WAYS = ("shared", "own")
RETRIEVERS = (("MiniLM", "base"), ("query-only adapter", "docs-query"), ("adapter", "docs-both"))


def rag_table(rag: dict[str, Any]) -> str:
    docs = rag["docs"]
    rows = {(row["retriever"], row["stage"]): row["metrics"]["ndcg@10"] for row in docs["retrieval"]}

    def cell(name: str, stage: str) -> str:
        gain = rows[name, stage].get("gain_ci95")
        return f"{rows[name, stage]['mean']:.3f}" + (f" ({gain[0]:+.3f} … {gain[1]:+.3f})" if gain else "")

    lines = [f"| {label} | {cell(name, 'dense')} | {cell(name, 'weights')} |" for label, name in RETRIEVERS]
    head = [f"| nDCG@10, {docs['test_queries']} headings, {docs['sections']} sections | vectors | and BM25 |", "|---|---|---|"]
    return "\n".join([*head, *lines, f"| BM25 alone | – | {cell('–', 'bm25')} |"])


def rag_text(rag: dict[str, Any]) -> str:
    docs, tenants, overhead, million = rag["docs"], rag["tenants"], rag["overhead"], rag["million"]
    ways = [_way(tenants[way]) for way in WAYS]
    lines = [
        "In brackets the 95 % interval of the gain over MiniLM's vectors. The adapters were trained on "
        f"{docs['synth']['kept']:,} synthetic queries of other files",
        f"(`data synth`, no language model). One index for {tenants['tenants']} tenants' query-only adapters: {ways[0]};",
        f"an index for each of {tenants['tenants']} adapters: {ways[1]}.",
        f"Recall against exact search on {rag['faiss']['kinds'][0]['documents']:,} medical answers, one thread:",
        ",\n".join(map(_kind, rag["faiss"]["kinds"])) + ".",
        _medquad(rag["medquad"]),
        f"Over {overhead['rows']:,} vectors a question spends {overhead['dense']['p50_ms']:.1f} ms outside the engines at the median, "
        f"{overhead['hybrid_rrf']['p50_ms']:.1f} ms with BM25.",
        f"Indexing runs at {rag['indexing']['indexing_of_engine']:.2f} of the embedding engine's own speed. A million vectors are built in",
        f"{million['build_peak_bytes'] / 2**30:.1f} GiB and served in {million['serving']['resident_bytes'] / 2**30:.1f} GiB. "
        "From [rag.json](benchmarks/results/rag.json), made by",
        "`benchmarks/rag.py`, `rag_indexes.py` and `rag_docs.py` beside it.",
    ]
    return "\n".join(lines)


def _medquad(part: dict[str, Any]) -> str:
    """nDCG@10 of vectors alone, and of /v1/rerank over vectors and BM25 by rank."""
    rows = {(row["retriever"], row["stage"]): row["metrics"]["ndcg@10"]["mean"] for row in part["retrieval"]}
    names = (("MiniLM", "base"), ("query-only adapter", "medquad-query"), ("adapter", "medquad-both"))
    scores = ", ".join(f"{label} {rows[name, 'dense']:.3f} ({rows[name, 'rerank']:.3f})" for label, name in names)
    return (
        f"On {part['documents']:,} of those answers, {part['test_queries']} questions, nDCG@10 of the vectors (and, in brackets, of "
        f"`/v1/rerank`\nover vectors and BM25): {scores}; BM25 alone {rows['–', 'bm25']:.3f}."
    )


def _way(way: dict[str, Any]) -> str:
    return f"{_mib(way['bytes'])}, built in {way['build_seconds']:.0f} s, nDCG@10 {way['ndcg@10']:.3f}"


def _kind(row: dict[str, Any]) -> str:
    probes = f" ({row['probes']} lists)" if row["probes"] else ""
    speed = f"{row['queries_per_second']:,.0f} queries/s in {_mib(row['index_bytes'])}"
    return f"{row['kind']}{probes} {row['recall_against_exact']:.3f} at {speed}"


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f} MiB"
