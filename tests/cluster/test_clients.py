"""Clients made for OpenAI's API (openai, lm-eval, schemathesis) against a real server."""

import json
from pathlib import Path
from typing import Any, Literal

import fuzz
import lm_eval
import pytest
import schemathesis
import torch
from langchain_core.messages import HumanMessage, SystemMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from lm_eval.tasks import TaskManager
from pydantic import BaseModel, SecretStr
from schemathesis.generation import GenerationMode
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.cluster

MODEL = "bytes"
CASES = 20
"""Of each path, sound and unsound; `fuzz.py` runs ten thousand."""


@pytest.fixture(scope="module")
def server(start_server: Any) -> Any:
    return start_server("--max-model-len", "800")


@pytest.fixture(scope="module")
def llm(server: Any) -> ChatOpenAI:
    return ChatOpenAI(
        model=MODEL, base_url=f"{server.url}/v1", api_key=SecretStr("none"), temperature=0, max_retries=0, seed=1,
        max_completion_tokens=60,
    )  # fmt: skip


class Trip(BaseModel):
    """No field is free text, which a random model would write until its context is full."""

    city: Literal["Bern", "Rome"]
    days: Literal[1, 2]


@tool
def weather(city: Literal["Bern", "Rome"]) -> str:
    """The arguments of a tool call."""
    return "rain"


def test_langchain_invokes_batches_and_streams(llm: ChatOpenAI) -> None:
    messages = [SystemMessage("be brief"), HumanMessage("hello")]
    whole = llm.invoke(messages)
    assert whole.usage_metadata is not None and whole.usage_metadata["output_tokens"] > 0
    assert "".join(str(chunk.content) for chunk in llm.stream(messages)) == whole.content
    assert [answer.content for answer in llm.batch([messages, messages])] == [whole.content] * 2


def test_langchain_gets_structured_answers_and_calls(llm: ChatOpenAI) -> None:
    free = llm.model_copy(update={"max_tokens": 200})
    trip: Any = free.with_structured_output(Trip, method="json_schema", include_raw=True).invoke("plan")
    assert trip["parsing_error"] is None and isinstance(trip["parsed"], Trip)
    called: Any = free.bind_tools([weather], tool_choice="weather", strict=True).invoke("how is it in Bern?")
    assert called.tool_calls
    for call in called.tool_calls:
        assert call["name"] == "weather" and weather.invoke(call["args"]) == "rain"


def evaluate(server: Any, folder: Path, task: str, **model_args: Any) -> list[Any]:
    """The samples of an lm-eval task with six sums; ``task`` is the rest of its description."""
    documents = [
        {"question": f"{i} and {i} make", "answer": str(2 * i), "choices": [str(2 * i), "a lot"], "right": 0}
        for i in range(6)
    ]
    data = folder / "sums.json"
    data.write_text("\n".join(map(json.dumps, documents)))
    (folder / "sums.yaml").write_text(
        f"task: sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: '{data}'}}}}\n"
        f"test_split: test\ndoc_to_text: '{{{{question}}}} '\n{task}"
    )
    results: Any = lm_eval.simple_evaluate(
        model="local-completions",
        model_args={
            "model": MODEL, "base_url": f"{server.url}/v1/completions", "num_concurrent": 2, "max_retries": 1,
            **model_args,
        },
        tasks=["sums"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        bootstrap_iters=0,
        log_samples=True,
    )  # fmt: skip
    assert results["n-samples"]["sums"]["effective"] == len(documents)
    return list(results["samples"]["sums"])


def test_lm_eval_runs_a_task_over_local_completions(server: Any, tmp_path: Path) -> None:
    task = (
        "output_type: generate_until\ndoc_to_target: '{{answer}}'\n"
        'generation_kwargs: {until: ["\\n"], max_gen_toks: 8, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    # what it was given is what the server says to the same prompts
    for sample in evaluate(server, tmp_path, task, tokenizer_backend=None, tokenized_requests=False):
        (context, _) = sample["arguments"][0] if isinstance(sample["arguments"], list) else (
            sample["arguments"]["gen_args_0"]["arg_0"], None
        )  # fmt: skip
        body = {"model": MODEL, "prompt": context, "max_tokens": 8, "temperature": 0, "stop": ["\n"]}
        assert sample["resps"][0][0] == server.post("/v1/completions", body).json()["choices"][0]["text"]


def test_lm_eval_gets_the_likelihood_of_choices(server: Any, byte_model: Path, tmp_path: Path) -> None:
    """The log-likelihood by one forward pass of transformers over context and choice."""
    task = (
        "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: right\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )
    tokenizer = AutoTokenizer.from_pretrained(byte_model)
    backbone = AutoModelForCausalLM.from_pretrained(byte_model)
    samples = evaluate(
        server, tmp_path, task + "target_delimiter: ''\n", tokenizer_backend="huggingface", tokenizer=str(byte_model)
    )
    for sample in samples:
        context = sample["doc"]["question"]  # lm-eval counts the space behind it to the choices
        for choice, told in zip(sample["doc"]["choices"], sample["resps"], strict=True):
            tokens = torch.tensor([tokenizer(f"{context} {choice}")["input_ids"]])
            with torch.inference_mode():
                logprobs = backbone(tokens).logits[0, :-1].log_softmax(-1)
            own = range(len(context) - 1, tokens.shape[1] - 1)
            want = sum(float(logprobs[at, tokens[0, at + 1]]) for at in own)
            assert told[0][0] == pytest.approx(want, abs=1e-3)
            assert told[0][1] == all(int(logprobs[at].argmax()) == int(tokens[0, at + 1]) for at in own)


@pytest.fixture(scope="module")
def interface(server: Any) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


@pytest.mark.parametrize("mode", list(GenerationMode), ids=str)
@pytest.mark.parametrize("path", fuzz.PATHS)
def test_no_request_is_a_server_error(server: Any, interface: Any, path: str, mode: GenerationMode) -> None:
    """Every request ends within its time limit, and every stream has well-formed events only."""
    fuzz.try_cases(server.url, interface, path, mode, CASES)


def test_the_server_is_well_afterwards(server: Any) -> None:
    fuzz.check_well(server.url, MODEL)
