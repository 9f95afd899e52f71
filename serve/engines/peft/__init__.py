"""The peft engine: transformers + PEFT behind vLLM's small HTTP. Any machine, any method of the table; LoRA adapters and virtual
tokens mix row by row in one forward pass, the others run in groups.

__main__.py   arguments, cores, socket
http.py       routes and bearer key          bodies.py    request bodies, closed
answers.py    OpenAI's response shapes       text.py      token ids → text, piece by piece
bank.py       one base, many adapters        batch.py     continuous batching with a KV cache
mixed.py      a LoRA for each row               sharing.py    modules anew, tensors shared
sampling.py   logits → token                 worker.py    the one thread that touches the model
structure.py  answers held to a schema       tools.py     tool calls, told to the template and read from the answer
"""
