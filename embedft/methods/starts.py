"""Where an adapter begins when not where PEFT puts it: PiSSA's, OLoRA's, LoftQ's and EVA's A and B, and virtual tokens.
The base is read and never written."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from embedft import int8
from embedft.base import Base, BaseSpec, source_folder
from embedft.errors import BaseNotFound, MethodUnsupported
from embedft.methods.companion import lora_layers, set_companion
from embedft.methods.table import Method, option
from embedft.model_folder import quantization_of, weight_files
from embedft.recipe import AdapterSection

if TYPE_CHECKING:
    from torch import Tensor


def start(model: Any, base: Base, method: Method, adapter: AdapterSection, *, batches: Iterable[Mapping[str, Any]] | None) -> None:
    """Set the adapter's first values by the row's `start`."""
    if method.start == "eva":
        _eva(model, batches)
    elif method.start == "loftq":
        _loftq(model, base, adapter)
    elif method.start == "words":
        _words(model, adapter)
    else:
        name = str(method.start)
        iterations = int(option(adapter, "iterations")) if name == "pissa" else 0
        _principal(model, f"{name}_niter_{iterations}" if iterations else name)


def _principal(model: Any, how: str) -> None:
    """PiSSA or OLoRA: PEFT's own initialisation on a private copy of each weight, one at a time; the copy is thrown away.

    PEFT would leave W − s B₀A₀ in the base. Here the base keeps W and the frozen pair holds −s B₀A₀.
    """
    import torch
    from peft import LoraConfig
    from peft.tuners.lora import Linear

    pairs: dict[str, tuple[Any, Any]] = {}
    for name, layer in lora_layers(model):
        weight = layer.get_base_layer().weight
        rank = layer.r["default"]
        if rank > min(layer.in_features, layer.out_features):
            most = min(layer.in_features, layer.out_features)
            why = f"it takes the {rank} greatest directions of {name}, which has {most}: lower adapter.r"
            raise MethodUnsupported(how.partition("_")[0], where="at this rank", why=why)
        config = LoraConfig(r=rank, lora_alpha=layer.lora_alpha["default"], init_lora_weights=how)  # pyright: ignore[reportArgumentType]
        copy = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        copy.weight = torch.nn.Parameter(weight.detach().float().clone(), requires_grad=False)
        private: Any = Linear(copy, "default", config, r=rank, lora_alpha=int(layer.lora_alpha["default"]))
        with torch.no_grad():
            first, second = private.lora_A["default"].weight, private.lora_B["default"].weight
            layer.lora_A["default"].weight.copy_(first)
            layer.lora_B["default"].weight.copy_(second)
            pairs[name] = first.detach().clone(), -layer.scaling["default"] * second.detach()
    set_companion(model, pairs)


def _words(model: Any, adapter: AdapterSection) -> None:
    """Virtual tokens begin as entries of the vocabulary, drawn at random (arXiv 2104.08691, section 3.2), or as the recipe's `text`.

    A prefix begins as the keys and values that the base makes of them; a task's own factors (arXiv 2303.02861) begin near one. PEFT
    begins at noise of norm √hidden, many times a word's, which a base has never met: next to nothing is learnt from there.
    """
    import torch
    from peft import initialize_kv_prefix_from_past_key_values

    encoder, words = model.prompt_encoder["default"], model.get_base_model().get_input_embeddings()
    with torch.no_grad():
        ids = torch.randint(words.num_embeddings, (adapter.r,)).to(words.weight.device)
        if adapter.method == "prefix_tuning":
            if not encoder.prefix_projection:
                cache = model.get_base_model()(input_ids=ids[None], use_cache=True).past_key_values
                initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, num_virtual_tokens=adapter.r)
            return
        if adapter.method == "p_tuning":  # its network's last layer is fitted: as many rows as virtual tokens, fewer than it has columns
            last = encoder.mlp_head[-1]
            inner = encoder.mlp_head[:-1](encoder.embedding.weight)
            last.weight.copy_((torch.linalg.pinv(inner) @ (words(ids).to(inner) - last.bias)).T)
        elif not adapter.options.get("text"):
            encoder.embedding.weight.copy_(words(ids))
        if adapter.method == "multitask_prompt_tuning":
            encoder.prefix_task_cols.add_(1 / encoder.num_ranks)
            encoder.prefix_task_rows.add_(1)


def _loftq(model: Any, base: Base, adapter: AdapterSection) -> None:
    """s B A = SVD_r(W − dq(Q)) with Q fixed: the base folder that will be served, not one quantized again for the adapter."""
    import torch

    weights = original_weights(base)
    for name, layer in lora_layers(model):
        lost = weights(name) - dequantized(layer.get_base_layer())
        u, s, v = torch.linalg.svd(lost, full_matrices=False)
        root = s[: adapter.r].sqrt()
        rank = len(root)  # less than r in a layer that has no more directions: the rest begins as in any LoRA
        with torch.no_grad():
            layer.lora_A["default"].weight[:rank] = root[:, None] * v[:rank]
            layer.lora_B["default"].weight.zero_()[:, :rank] = u[:, :rank] * root / layer.scaling["default"]


def original_weights(base: Base) -> Any:
    """A function: layer name in the loaded model → its full-precision weight, read from the folder that was quantized."""
    from safetensors import safe_open

    spec = BaseSpec(base.spec.model, "none", base.spec.revision)
    try:
        folder = source_folder(spec)
    except BaseNotFound as error:
        raise MethodUnsupported("loftq", where="here", why=str(error)) from error
    if quantization_of(folder) != "none":
        raise MethodUnsupported(
            "loftq",
            where="on a folder that is already quantized",
            why="it needs the weights from before: name those as base.model and set base.quantization",
        )
    files = {key: path for path in weight_files(folder) for key in _keys(path)}

    def read(name: str) -> "Tensor":
        found = [key for key in files if key == f"{name}.weight" or key.endswith(f".{name}.weight") or f"model.{key}" == f"{name}.weight"]
        if not found:
            raise MethodUnsupported("loftq", where=f"on {name}", why=f"{folder.name} names that weight otherwise")
        with safe_open(str(files[found[0]]), framework="pt") as file:
            return file.get_tensor(found[0]).float().to(base.model.device)

    return read


def _keys(path: Any) -> list[str]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return list(file.keys())


def dequantized(layer: Any) -> "Tensor":
    """The weight (out, in) that a linear layer multiplies by, in fp32, whatever it is stored as."""
    import torch

    weight = layer.weight
    kind = type(weight).__name__
    if kind == "Params4bit":
        import bitsandbytes.functional as bnb

        return bnb.dequantize_4bit(weight.data, weight.quant_state).float()
    if kind == "Int8Params":
        scales = weight.SCB if weight.SCB is not None else layer.state.SCB
        return int8.dequantized(weight.data, scales, dtype=torch.float32)
    return weight.detach().float()


def _eva(model: Any, batches: Iterable[Mapping[str, Any]] | None) -> None:
    """A = leading right singular vectors of each layer's inputs on the training data; B = 0, so nothing changes yet."""
    from peft import initialize_lora_eva_weights

    if batches is None:
        raise MethodUnsupported("eva", where="in this trainer", why="it begins from batches of the training data, and none were given")

    def forward(network: Any, inputs: Mapping[str, Any]) -> Any:
        return network(**{key: value for key, value in inputs.items() if key not in {"labels", "logits_to_keep"}})

    chosen = [
        {key: value.to(model.device) if hasattr(value, "to") else value for key, value in batch.items() if value is not None}
        for batch in batches
    ]
    for batch in chosen:
        batch.setdefault("labels", batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100))
        if batch["labels"].shape != batch["input_ids"].shape:  # only the tail has labels; EVA masks padding by them
            batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    config = model.peft_config["default"]
    wanted, most = round(config.r * config.eva_config.rho), max(int(batch["attention_mask"].sum()) for batch in chosen)
    if most < wanted:  # PEFT would look for such a batch without end
        why = f"it needs {wanted} tokens in a batch (r x rho) and the largest has {most}: raise train.batch, or lower adapter.r"
        raise MethodUnsupported("eva", where="on this data", why=why)
    was_training = model.training
    model.eval()
    initialize_lora_eva_weights(model, dataloader=chosen, forward_fn=forward, show_progress_bar=False)
    model.train(was_training)
