"""One artefact in its own stock runtime: greedy text, logits, speed. Started by formats.py.

It runs in that runtime's environment, reads a request as JSON from its standard input, imports nothing of
this project, and prints its answer as the last line: greedy token ids, seconds of decoding, and where the
logits of the scored text lie. Runtimes: transformers, onnxruntime, vllm, llama.cpp.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

Ids = list[int]


class Transformers:
    """AutoModelForCausalLM in fp32 arithmetic."""

    def __init__(self, path: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=True, dtype=torch.float32
        ).eval()

    def logits(self, ids: Ids) -> np.ndarray:
        with self.torch.inference_mode():
            return self.model(self.torch.tensor([ids])).logits[0].numpy()

    def generate(self, ids: Ids) -> Iterator[int]:
        with self.torch.inference_mode():
            done = self.model(self.torch.tensor([ids]), use_cache=True)
            while True:
                token = int(done.logits[0, -1].argmax())
                yield token
                done = self.model(self.torch.tensor([[token]]), past_key_values=done.past_key_values)


class OnnxRuntime:
    """onnxruntime-genai for text; the same graph in onnxruntime for the logits of every position."""

    def __init__(self, path: str, threads: int) -> None:
        import onnxruntime
        import onnxruntime_genai

        self.genai = onnxruntime_genai
        self.model = onnxruntime_genai.Model(path)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(f"{path}/model.onnx", options)

    def logits(self, ids: Ids) -> np.ndarray:
        feed: dict[str, Any] = {
            entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
            for entry in self.session.get_inputs()
            if entry.name.startswith("past_key_values")
        }
        feed |= {"input_ids": np.array([ids]), "attention_mask": np.ones((1, len(ids)), np.int64)}
        feed["last_start"] = np.array([-len(ids)])
        return self.session.run(["logits"], feed)[0][0]

    def generate(self, ids: Ids) -> Iterator[int]:
        parameters = self.genai.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(ids) + 256, do_sample=False)
        generator = self.genai.Generator(self.model, parameters)
        generator.append_tokens(np.array(ids, np.int32))
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_sequence(0)[-1])


class Llama:
    """llama-cpp-python."""

    def __init__(self, path: str, threads: int) -> None:
        from llama_cpp import Llama as Model

        settings = {"n_ctx": 1024, "n_batch": 512, "n_threads": threads, "n_threads_batch": threads}
        self.model = Model(path, logits_all=True, verbose=False, **settings)

    def logits(self, ids: Ids) -> np.ndarray:
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])

    def generate(self, ids: Ids) -> Iterator[int]:
        self.model.reset()
        self.model.eval(ids)
        while True:
            token = int(np.argmax(self.model.scores[self.model.n_tokens - 1]))
            yield token
            self.model.eval([token])


class Vllm:
    """vLLM's offline engine, uncompiled; logits are those it computes for the prompt's log-probabilities."""

    def __init__(self, path: str, threads: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(
            map(str, sorted(os.sched_getaffinity(0))[:threads])
        )
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM, SamplingParams

        self.sampling = SamplingParams
        dtype = json.loads((Path(path) / "config.json").read_text())["dtype"]
        limits = {"max_model_len": 1024, "max_num_seqs": 4, "max_num_batched_tokens": 1024}
        self.llm = LLM(path, dtype=dtype, enforce_eager=True, kv_cache_memory_bytes=1 << 28, **limits)
        self.seen: list[np.ndarray] = []
        self.llm.apply_model(self._listen)

    def _listen(self, model: Any) -> None:
        compute = model.compute_logits

        def listening(hidden: Any, *rest: Any) -> Any:
            logits = compute(hidden, *rest)
            self.seen.append(logits.float().numpy().copy())
            return logits

        model.compute_logits = listening

    def logits(self, ids: Ids) -> np.ndarray:
        self.seen.clear()
        self._run(ids, max_tokens=1, prompt_logprobs=0)
        last, *rest = sorted(self.seen, key=len)
        return np.concatenate([*rest, last])[: len(ids)]

    def generate(self, ids: Ids) -> Iterator[int]:
        yield from self._run(ids, max_tokens=64).outputs[0].token_ids

    def _run(self, ids: Ids, **options: Any) -> Any:
        sampling = self.sampling(temperature=0, ignore_eos=True, **options)
        return self.llm.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)[0]

    def decode_seconds(self, ids: Ids, tokens: int) -> float:
        """vLLM hands text over as a whole, so a longer answer is compared with a shorter one."""
        short, long = (_timed(lambda n=n: self._run(ids, max_tokens=n)) for n in (1, tokens + 1))
        return long - short


RUNTIMES: dict[str, Callable[[str, int], Any]] = {
    "transformers": Transformers,
    "onnxruntime": OnnxRuntime,
    "vllm": Vllm,
    "llama.cpp": Llama,
}


def main() -> None:
    request = json.load(sys.stdin)
    runtime = RUNTIMES[request["runtime"]](request["path"], request["threads"])
    answer: dict[str, Any] = {"text": [_greedy(runtime, ids, request["new"]) for ids in request["prompts"]]}
    if request["scored"]:
        rows = [runtime.logits(ids) for ids in request["scored"]]
        np.save(request["logits"], np.stack(rows).astype(np.float32))
    if request["timed"]:
        answer["decode_tok_s"] = _speed(runtime, request["timed"], request["timed_tokens"])
    print("\n" + json.dumps(answer))


def _greedy(runtime: Any, ids: Ids, count: int) -> Ids:
    text: Ids = []
    for token in runtime.generate(ids):
        text.append(token)
        if len(text) == count:
            break
    return text


def _speed(runtime: Any, ids: Ids, tokens: int) -> float:
    """Tokens a second of decoding one sequence, the best of three."""
    return max(tokens / _decode_seconds(runtime, ids, tokens) for _ in range(3))


def _decode_seconds(runtime: Any, ids: Ids, tokens: int) -> float:
    if hasattr(runtime, "decode_seconds"):
        return float(runtime.decode_seconds(ids, tokens))
    stream = runtime.generate(ids)
    next(stream)
    return _timed(lambda: [next(stream) for _ in range(tokens)])


def _timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
