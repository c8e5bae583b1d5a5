"""A model of one's own as MetaLadder's teacher: a function from a chat request to its answer."""

from collections.abc import Callable
from threading import Lock
from typing import Any

from llmtrain.data.chat.template import ChatTemplate, folder_template
from llmtrain.errors import UserError
from llmtrain.model.sampling import Sampling
from llmtrain.tools.completions import Request, complete, runner_for
from llmtrain.tools.open_model import OpenModel, open_model


def local_teacher(path: str, *, device: str = "auto", dtype: str = "auto") -> Callable[[dict[str, Any]], str]:
    """Answer with the model of a folder and its chat template, one request at a time.

    Raises UserError if the folder holds no model, or no chat template.
    """
    opened, lock = open_model(path, device=device, dtype=dtype), Lock()
    template = folder_template(opened.need_tokenizer().path.parent)

    def answer(request: dict[str, Any]) -> str:
        with lock:
            return _answer(opened, template, request)

    return answer


def _answer(opened: OpenModel, template: ChatTemplate, request: dict[str, Any]) -> str:
    tokens = opened.need_tokenizer().encode_marked(template.render(request["messages"], answer_follows=True))
    room = opened.cfg.max_seq_len - len(tokens)
    if room < 1:
        raise UserError(f"the teacher's model.max_seq_len {opened.cfg.max_seq_len} is too short for a request of {len(tokens)} tokens")
    sampling = Sampling(
        max_new=min(request["max_tokens"], room),
        temperature=request["temperature"],
        seed=request["seed"],
        stop_ids=opened.stop_ids,
    )
    [done] = complete(runner_for(opened, [Request(tokens, sampling)]), opened.tokenizer, [Request(tokens, sampling)])
    return done.text
