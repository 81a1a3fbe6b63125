"""Programs of real clients, as their users write them: run in the clients' own environment.

Usage: python client_programs.py CLIENT URL. Each asks a service at an address and checks what it
gets against what the service says to a plain request. For "jupyter" the environment names a run
directory, and lmcot's own Python, in which the notebook's kernel runs. "notebook FILE" runs the
cells of a file there.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

CONTEXT = "Elko is a city in Nevada. It straddles the Humboldt River."
QUESTION = "Which river?"
PROMPT = f"Context: {CONTEXT}\nQuestion: {QUESTION}"
MESSAGES: Any = [{"role": "user", "content": PROMPT}]


class River(BaseModel):
    """Where a question's answer goes."""

    answer: str


class Pair(BaseModel):
    """More than one answer can fill."""

    river: str
    town: Literal["Elko", "Reno"]
    year: int


def plain(url: str) -> dict[str, Any]:
    """What the service's own route says."""
    body = json.dumps({"question": QUESTION, "context": CONTEXT}).encode()
    request = urllib.request.Request(f"{url}/v1/answer", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        found: dict[str, Any] = json.load(reply)
    return found


def error_of(call: Callable[[], Any]) -> Exception | None:
    """What a call raises; None if it does not."""
    try:
        call()
    except Exception as error:
        return error
    return None


def ask_openai(url: str) -> None:
    """All of its ways to ask."""
    import openai

    client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    wanted = plain(url)
    assert [one.id for one in client.models.list()] == ["lmcot"]
    assert client.models.retrieve("lmcot").owned_by == "lmcot"
    missing = error_of(lambda: client.models.retrieve("gpt-4"))
    assert isinstance(missing, openai.NotFoundError)
    assert "there is no model 'gpt-4'" in str(missing)
    create: Any = client.chat.completions.create
    taken: Any = ({}, {"max_tokens": 1024}, {"max_completion_tokens": 4096}, {"n": None})
    for options in taken:
        found = create(model="lmcot", messages=MESSAGES, **options)
        assert found.choices[0].message.content == wanted["answer"], options
        assert found.choices[0].message.reasoning_content == wanted["rationale"]
        cut = wanted["rationale_cut"] or wanted["answer_cut"]
        assert found.choices[0].finish_reason == ("length" if cut else "stop")
        assert found.usage.total_tokens == sum(wanted["tokens"].values())
    raw = client.chat.completions.with_raw_response.create(model="lmcot", messages=MESSAGES)
    assert raw.headers["x-request-id"].count(",") == 0
    assert raw.parse().id == f"chatcmpl-{raw.headers['x-request-id']}"
    stream = create(
        model="lmcot", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == wanted["answer"]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == sum(wanted["tokens"].values())
    with client.chat.completions.stream(model="lmcot", messages=MESSAGES) as events:
        told = "".join(one.delta for one in events if one.type == "content.delta")
    assert told == wanted["answer"]
    parsed = client.chat.completions.parse(
        model="lmcot", messages=MESSAGES, response_format=River
    ).choices[0]
    assert parsed.message.parsed == River(answer=wanted["answer"])
    tool = openai.pydantic_function_tool(River)
    called = client.chat.completions.parse(
        model="lmcot", messages=MESSAGES, tools=[tool],
        tool_choice={"type": "function", "function": {"name": "River"}},
    ).choices[0]  # fmt: skip
    (call,) = called.message.tool_calls or []
    assert call.function.parsed_arguments == River(answer=wanted["answer"])
    refused: Any = [
        {"n": 2}, {"logprobs": True}, {"tools": [tool]}, {"logit_bias": {"5": 1}},
        {"presence_penalty": 1}, {"modalities": ["text", "audio"]},
    ]  # fmt: skip
    for options in refused:
        error = error_of(partial(create, model="lmcot", messages=MESSAGES, **options))
        assert isinstance(error, openai.BadRequestError), (error, options)
        assert error.param in options, (error, options)
    asyncio.run(_ask_openai_at_once(url, wanted["answer"]))


async def _ask_openai_at_once(url: str, wanted: str) -> None:
    import openai

    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    asked = [client.chat.completions.create(model="lmcot", messages=MESSAGES) for _ in range(4)]
    for found in await asyncio.gather(*asked):
        assert found.choices[0].message.content == wanted
    await client.close()


def ask_litellm(url: str) -> None:
    """Its SDK, streamed with the tokens told, and structured."""
    import litellm

    wanted = plain(url)
    options: Any = {
        "model": "openai/lmcot", "api_base": f"{url}/v1", "api_key": "none", "messages": MESSAGES,
        "max_tokens": 1000, "num_retries": 0,
    }  # fmt: skip
    found: Any = litellm.completion(**options)
    assert found.choices[0].message.content == wanted["answer"]
    assert found.choices[0].message.reasoning_content == wanted["rationale"]
    assert found.usage.total_tokens == sum(wanted["tokens"].values())
    chunks = list(
        litellm.completion(**options, stream=True, stream_options={"include_usage": True})
    )
    told = "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
    assert told == wanted["answer"]
    usage = [one.usage for one in chunks if getattr(one, "usage", None)]
    assert usage[-1].total_tokens == sum(wanted["tokens"].values())
    formed: Any = litellm.completion(**options, response_format=River)
    assert River.model_validate_json(formed.choices[0].message.content).answer == wanted["answer"]


def ask_langchain(url: str) -> None:
    """Chat, stream, batch, and structured output in its three ways."""
    from langchain_openai import ChatOpenAI

    wanted = plain(url)
    model = ChatOpenAI(
        model="lmcot", base_url=f"{url}/v1", api_key="none", max_tokens=2000, max_retries=0,
        stream_usage=True,
    )  # fmt: skip
    total = sum(wanted["tokens"].values())
    found = model.invoke(PROMPT)
    assert found.content == wanted["answer"]
    assert found.usage_metadata["total_tokens"] == total
    chunks = list(model.stream(PROMPT))
    assert "".join(str(one.content) for one in chunks) == wanted["answer"]
    assert sum((one.usage_metadata or {}).get("total_tokens", 0) for one in chunks) == total
    assert [one.content for one in model.batch([PROMPT, PROMPT])] == [wanted["answer"]] * 2
    chain = [("system", "Answer as briefly as you can."), ("human", PROMPT)]
    assert isinstance(model.invoke(chain).content, str)
    for method in ("json_schema", "function_calling"):
        structured: Any = model.with_structured_output(River, method=method)
        assert structured.invoke(PROMPT) == River(answer=wanted["answer"]), method
    json_mode: Any = model.with_structured_output(River, method="json_mode")
    assert isinstance(json_mode.invoke(f'{PROMPT} Reply in JSON, as {{"answer": "..."}}'), River)


def ask_dspy(url: str) -> None:
    """A signature, and one with reasoning."""
    import dspy

    wanted = plain(url)
    model = dspy.LM(
        "openai/lmcot", api_base=f"{url}/v1", api_key="none", max_tokens=4000, cache=False,
        num_retries=0,
    )  # fmt: skip
    dspy.configure(lm=model)
    predict = dspy.Predict("context, question -> answer")
    reasoned = dspy.ChainOfThought("context, question -> answer")
    for adapter in (dspy.ChatAdapter(use_json_adapter_fallback=False), dspy.JSONAdapter()):
        dspy.configure(lm=model, adapter=adapter)
        assert isinstance(predict(context=CONTEXT, question=QUESTION).answer, str)
        found = reasoned(context=CONTEXT, question=QUESTION)
        assert found.reasoning == wanted["rationale"]
    assert model(PROMPT)[0]["text"] == wanted["answer"]


def ask_instructor(url: str) -> None:
    """All its modes for OpenAI: those that work, and those that do not, as the docs have it."""
    from collections.abc import Iterable

    import instructor
    import openai
    from instructor.core import InstructorRetryException

    wanted = plain(url)
    modes = instructor.Mode

    def ask(mode: Any, into: Any = River) -> Any:
        client: Any = instructor.from_openai(
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0), mode=mode
        )
        return client.chat.completions.create(
            model="lmcot", messages=list(MESSAGES), response_model=into, max_retries=0
        )

    def refusal(mode: Any, into: Any) -> str:
        try:
            found = ask(mode, into)
        except InstructorRetryException as error:
            return str(error)
        return f"none: {found}"

    for mode in (modes.TOOLS, modes.TOOLS_STRICT, modes.JSON, modes.JSON_SCHEMA):
        found = ask(mode)
        assert isinstance(found, River), mode
        if mode is not modes.JSON:  # which says more to the frozen LM
            assert found.answer == wanted["answer"], mode
    assert "do not choose among tools" in refusal(modes.PARALLEL_TOOLS, Iterable[River])
    assert "not found" in refusal(modes.RESPONSES_TOOLS, River).lower()


def ask_llm(url: str) -> None:
    """The command, with its model in a file of its own."""
    wanted = plain(url)
    with tempfile.TemporaryDirectory() as folder:
        models = Path(folder) / "extra-openai-models.yaml"
        models.write_text(
            f"- model_id: lmcot\n  model_name: lmcot\n  api_base: {url}/v1\n"
            "  supports_schema: true\n",
            encoding="utf-8",
        )
        environment = {**os.environ, "LLM_USER_PATH": folder, "OPENAI_API_KEY": "none"}
        program = str(Path(sys.executable).parent / "llm")

        def run(*more: str) -> str:
            done = subprocess.run(
                [program, "-m", "lmcot", *more, PROMPT],
                env=environment, capture_output=True, text=True, timeout=120, check=False,
            )  # fmt: skip
            assert done.returncode == 0, done.stderr
            return done.stdout.strip()

        assert run("-o", "max_tokens", "500").endswith(wanted["answer"].strip())
        assert run("--no-stream").endswith(wanted["answer"].strip())
        assert json.loads(run("--schema", "answer str")) == {"answer": wanted["answer"]}


def ask_generated(url: str) -> None:
    """A client that openapi-python-client makes of the service's document."""
    wanted = plain(url)
    with tempfile.TemporaryDirectory() as folder:
        settings = Path(folder) / "settings.yaml"
        settings.write_text("post_hooks: []\n", encoding="utf-8")  # no formatter is needed
        generator = Path(sys.executable).parent / "openapi-python-client"
        made = subprocess.run(
            [str(generator), "generate", "--url", f"{url}/openapi.json", "--meta", "none",
             "--output-path", f"{folder}/made", "--config", str(settings), "--fail-on-warning"],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert made.returncode == 0, made.stdout + made.stderr
        sys.path.insert(0, folder)
        program = f"""
from made import AuthenticatedClient
from made.api.default import answer_v1_answer_post as answer, models_v1_models_get as models
from made.api.default import chat_v1_chat_completions_post as chatting
from made.models import AnswerRequest, ChatMessage, ChatRequest, ChatCompletion, AnswerResponse
with AuthenticatedClient(base_url={url!r}, token="none", timeout=60) as client:
    found = answer.sync(
        client=client, body=AnswerRequest(question={QUESTION!r}, context={CONTEXT!r}))
    assert isinstance(found, AnswerResponse), found
    assert found.answer == {wanted["answer"]!r}
    message = ChatMessage.from_dict(dict(role="user", content={PROMPT!r}))
    chat = chatting.sync(client=client, body=ChatRequest(messages=[message]))
    assert isinstance(chat, ChatCompletion), chat
    assert chat.choices[0].message.content == {wanted["answer"]!r}
    assert models.sync(client=client).data[0].id == "lmcot"
"""
        exec(compile(program, "generated", "exec"), {})


NOTEBOOK = (
    "from lmcot import Guide\nfrom lmcot.guide import Refused\nguide = Guide(RUN)",
    "first = guide.answer(QUESTION, CONTEXT)\nprint(first.answer)",
    "found = await guide.aanswer(QUESTION, CONTEXT)\nprint(found.answer)",
    "for bad in (dict(samples=0), dict(temperature=-1), dict(max_tokens=-5), dict(seed=-1)):\n"
    "    try:\n        guide.answer(QUESTION, **bad)\n"
    "    except Refused as error:\n        print(error.param)",
    "import asyncio\n"
    "task = asyncio.create_task(guide.aanswer(QUESTION, CONTEXT, samples=3, seed=1))\n"
    "print(guide.answer(QUESTION, CONTEXT).answer == first.answer, len((await task).votes))",
    "guide.close()",
)
"""Its cells."""


def execute(notebook: Any, timeout: int) -> None:
    """Runs a notebook's cells in a real kernel, on lmcot's own Python."""
    import nbclient

    own = str(Path(nbclient.__file__).parents[1])
    start = (
        f"import sys; sys.path.append({own!r}); from ipykernel import kernelapp; "
        "kernelapp.launch_new_instance()"
    )
    with tempfile.TemporaryDirectory() as folder:
        kernel = Path(folder) / "kernels" / "lmcot" / "kernel.json"
        kernel.parent.mkdir(parents=True)
        argv = [os.environ["LMCOT_PYTHON"], "-c", start, "-f", "{connection_file}"]
        kernel.write_text(
            json.dumps({"argv": argv, "display_name": "lmcot", "language": "python"}),
            encoding="utf-8",
        )
        os.environ |= {"JUPYTER_PATH": folder, "IPYTHONDIR": folder, "JUPYTER_RUNTIME_DIR": folder}
        nbclient.NotebookClient(notebook, timeout=timeout, kernel_name="lmcot").execute()


def execute_file(path: str) -> None:
    """Runs a notebook, and prints it with what its cells gave."""
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    execute(notebook, timeout=400)
    print(nbformat.writes(notebook))


def ask_jupyter(url: str) -> None:
    """`lmcot.Guide` in the cells of a notebook, in a real kernel."""
    import nbformat

    wanted = plain(url)
    notebook = nbformat.v4.new_notebook()
    values = {"RUN": os.environ["LMCOT_RUN"], "QUESTION": QUESTION, "CONTEXT": CONTEXT}
    given = "\n".join(f"{name} = {value!r}" for name, value in values.items())
    notebook.cells = [nbformat.v4.new_code_cell(cell) for cell in (given, *NOTEBOOK)]
    execute(notebook, timeout=120)
    told = ["".join(one.get("text", "") for one in cell.outputs) for cell in notebook.cells]
    assert told[2].rstrip("\n") == wanted["answer"]
    assert told[3] == told[2]
    assert told[4].split() == ["samples", "temperature", "max_tokens", "seed"]
    assert told[5] == "True 3\n"


PROGRAMS = {
    "openai": ask_openai,
    "litellm": ask_litellm,
    "langchain": ask_langchain,
    "dspy": ask_dspy,
    "instructor": ask_instructor,
    "llm": ask_llm,
    "openapi-python-client": ask_generated,
    "jupyter": ask_jupyter,
}

if __name__ == "__main__":
    {**PROGRAMS, "notebook": execute_file}[sys.argv[1]](sys.argv[2])
