"""Every error a user can meet, in one tree. Knows no other module of ours.

    EmbedftError                        exit 1
    ├── UsageError                      exit 2
    │   └── RecipeError
    ├── DataError
    ├── BaseError: BaseNotFound, BaseMismatch, QuantizationUnsupported
    ├── AdapterError: AdapterNotFound, AdapterInvalid, AdapterExists, GenerationConflict, ProbesFailed, TemplateMismatch
    ├── MethodUnsupported
    ├── TrainingInterrupted, ResumeRefused, Forgotten
    ├── RagError: IndexNotFound, IndexInvalid, LineageMismatch, DocumentsUnusable
    └── ServingError: InputInvalid, NotAuthorized, EngineFailed, EngineBusy

A message states the fact and then what to do. `code` is stable: clients may rely on it.
"""

from collections.abc import Sequence


class EmbedftError(Exception):
    """Root: anything that is the user's to mend. `code` is stable, `exit_code` is the CLI's."""

    code = "error"
    exit_code = 1


class UsageError(EmbedftError):
    code = "usage"
    exit_code = 2


class RecipeError(UsageError):
    """A recipe that does not parse; `problems` holds all its faults at once."""

    code = "recipe_invalid"

    def __init__(self, where: str, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__(f"{where}:\n" + "\n".join(f"  - {problem}" for problem in problems))


class DataError(EmbedftError):
    """Rows that cannot be used; `problems` are 'file:line: what is wrong, what was expected'."""

    code = "data_invalid"
    shown = 20

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        rest = len(self.problems) - self.shown
        lines = self.problems[: self.shown] + ([f"… and {rest} more"] if rest > 0 else [])
        super().__init__("the data cannot be used:\n" + "\n".join(f"  - {line}" for line in lines))


class BaseError(EmbedftError):
    code = "base_error"


class BaseNotFound(BaseError):
    code = "base_not_found"


class QuantizationUnsupported(BaseError):
    code = "quantization_unsupported"


class BaseMismatch(BaseError):
    """An adapter meets a base that it was not trained on. Both as `adapters.passport.base_said` has them, so that a person knows them."""

    code = "base_mismatch"

    def __init__(self, name: str, *, trained_on: str, serving: str) -> None:
        super().__init__(
            f"adapter {name!r} was trained on base {trained_on}, but here is {serving}: use the base that it was trained on, or retrain"
        )


class AdapterError(EmbedftError):
    code = "adapter_error"


class AdapterNotFound(AdapterError):
    code = "adapter_not_found"

    def __init__(self, name: str, known: Sequence[str] = (), *, unserved: str | None = None) -> None:
        """`unserved`: why a server that has it does not serve it."""
        self.name = name
        listed = f": there are {', '.join(sorted(known))}" if known else ""
        super().__init__(f"adapter {name!r} is not served: {unserved}" if unserved else f"no adapter named {name!r}{listed}")


class AdapterInvalid(AdapterError):
    code = "adapter_invalid"

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"adapter {name!r} cannot be used: {reason}")


class AdapterExists(AdapterError):
    code = "adapter_exists"


class GenerationConflict(AdapterError):
    """Compare-and-swap lost: the name points at another generation than the caller expected."""

    code = "generation_conflict"

    def __init__(self, name: str, *, expected: str, current: str | None) -> None:
        now = current[:12] if current else "nothing"
        super().__init__(f"{name!r} is at generation {now}, not {expected[:12]}: read it again and retry")


class ProbesFailed(AdapterError):
    """The engine's effect of an adapter is not the trainer's: it would not do what it was trained to do."""

    code = "probes_failed"

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(f"adapter {name!r} failed its probes: {reason}; it was not put to use")


class TemplateMismatch(AdapterError):
    """A chat would be rendered by another template than the adapter learnt from: its answers would be worse, without a word."""

    code = "template_mismatch"

    def __init__(self, name: str) -> None:
        super().__init__(
            f"adapter {name!r} was trained with another chat template than its base brings: render the prompt as in training and send it "
            "to /v1/completions, or train with the base's own template (leave data.template out)"
        )


class MethodUnsupported(EmbedftError):
    code = "method_unsupported"

    def __init__(self, method: str, *, where: str, why: str) -> None:
        super().__init__(f"method {method!r} is not supported {where}: {why}")


class TrainingInterrupted(EmbedftError):
    """Training stopped on request after writing a checkpoint; `command` resumes it."""

    code = "interrupted"
    exit_code = 130

    def __init__(self, checkpoint: str, command: str) -> None:
        self.checkpoint, self.command = checkpoint, command
        super().__init__(f"stopped; the state is in {checkpoint}; resume with: {command}")


class ResumeRefused(EmbedftError):
    code = "resume_refused"


class Forgotten(EmbedftError):
    """A trained adapter lost too much on the general set: it is saved at `path`, and its name was not moved to it."""

    code = "forgotten"

    def __init__(self, name: str, *, path: str, data: str, base: float, adapter: float, bound: float) -> None:
        self.path = path
        super().__init__(
            f"adapter {name!r} loses {base - adapter:.3f} on the general set {data} ({base:.3f} → {adapter:.3f}; at most {bound:g} may be "
            f"lost): it is saved in {path}, but {name!r} was not moved to it: train less (train.epochs, train.lr, adapter.r), allow more "
            "(eval.guard.drop), or take it as it is with --force"
        )


class RagError(EmbedftError):
    code = "rag_error"


class IndexNotFound(RagError):
    code = "index_not_found"

    def __init__(self, name: str, known: Sequence[str] = ()) -> None:
        listed = f": there are {', '.join(sorted(known))}" if known else ": make one with `embedft rag index`"
        super().__init__(f"no index {name!r}{listed}")


class IndexInvalid(RagError):
    """An index whose files are damaged, incomplete or not ours."""

    code = "index_invalid"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"index {name!r} cannot be used: {reason}")


class LineageMismatch(RagError):
    """Vectors of two lineages meet: their distances mean nothing. Lineages are 64 hex digits; a maker is like name@generation."""

    code = "lineage_mismatch"

    def __init__(self, index: str, *, holds: str, holds_by: str, given: str, given_by: str) -> None:
        self.holds, self.given = holds, given
        same = "; a base's own vectors are of one lineage where its weights, max_length and prompt are the same"
        super().__init__(
            f"index {index!r} holds vectors of lineage {holds[:12]} (by {holds_by}), and this question's belong to lineage {given[:12]} "
            f"(by {given_by}): use the adapter that it was built with, index again with this one, or fit a linear map "
            f"(`embedft rag ask --map`){same if holds_by == 'base' else ''}"
        )


class DocumentsUnusable(RagError):
    """Files that cannot be indexed; `problems` are 'file: what is wrong'."""

    code = "documents_unusable"

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        rest = len(self.problems) - 20
        lines = self.problems[:20] + ([f"… and {rest} more"] if rest > 0 else [])
        super().__init__("nothing can be indexed:\n" + "\n".join(f"  - {line}" for line in lines))


class ServingError(EmbedftError):
    code = "serving_error"


class InputInvalid(ServingError):
    """A request that cannot be served as it stands (HTTP 400); `param` names the field."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        self.code, self.param = code, param
        super().__init__(message)


class NotAuthorized(ServingError):
    code = "not_authorized"


class EngineFailed(ServingError):
    code = "engine_failed"


class EngineBusy(ServingError):
    code = "engine_busy"
