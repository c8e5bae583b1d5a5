"""The loop of a benchmark's process: a request per line of standard input, an answer per line of standard output, in JSON."""

import json
import os
import sys
import traceback


def answer_requests(worker: object) -> None:
    """Call the method of `worker` that each request names in `do`, with its other keys, until standard input ends.

    What libraries print goes to standard error, so that it does not mix with the answers. An error is answered as {"error": text}.
    """
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(worker, request.pop("do"))(**request)
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
