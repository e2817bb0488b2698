"""Scenario `early`: one prefill and one decode instance behind `mooncake proxy --early-first-token`, both real vLLM, greedy. Texts,
ends and usage of streamed completions must be what the prefill instance alone says, and most answers must have begun with its
token.

Uses the parts of the recipe's run_e2e.py, whose options it takes; `--proxy-cmd` is not one of them here: $MOONCAKE_BINARY is.
"""

import json
import os
import sys
import time
import urllib.request

sys.path.insert(0, os.environ["VLLM_RECIPE"])
import run_e2e as recipe  # noqa: E402

PROMPTS = [recipe.TEXT[i * 4000 : i * 4000 + 2500] for i in range(8)]
# What comes to the request, and whether the proxy shows prefill's token for it.
KINDS = [
    ("plain", {"ignore_eos": True}, True),
    ("usage at the end", {"stream_options": {"include_usage": True}}, True),
    ("usage always", {"stream_options": {"include_usage": True, "continuous_usage_stats": True}}, True),
    ("min_tokens", {"min_tokens": 12, "seed": 3}, True),
    ("two tokens", {"max_tokens": 2, "ignore_eos": True}, True),
    ("one token", {"max_tokens": 1}, False),
    ("stop", {"stop": ["zz"]}, False),
    ("a seed", {"temperature": 1.0, "seed": 3}, False),
    ("logprobs", {"logprobs": 1}, False),
]


def stream(url, prompt, more):
    """What a client can tell of an answer, and the seconds to its first event."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 24, "temperature": 0, "stream": True, **more}
    request = urllib.request.Request(url + "/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    began, first, events, done = time.time(), None, [], False
    with urllib.request.urlopen(request, timeout=180) as reply:
        kind = reply.headers["content-type"]
        for line in reply:
            first = first or time.time() - began
            if line.strip() == b"data: [DONE]":
                done = True
            elif line.startswith(b"data: "):
                events.append(json.loads(line[6:]))
    choices = [choice for event in events for choice in event["choices"]]
    usages = [event["usage"] for event in events if event.get("usage")]
    return {
        "head": kind,
        "text": "".join(choice["text"] for choice in choices),
        "ended": [choice["finish_reason"] for choice in choices if choice["finish_reason"]],
        "usage": usages[-1:],
        # An engine puts several tokens into one event when it is held up, so where they are counted differs.
        "prompts": sorted({u["prompt_tokens"] for u in usages}),
        "adds up": all(u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for u in usages),
        "rises": [u["completion_tokens"] for u in usages] == sorted(u["completion_tokens"] for u in usages),
        # The last event has a fingerprint, and of an answer in one event that is the first, too.
        "members": [[k for k in events[0] if k != "system_fingerprint"], list(choices[0]), list(events[-1])],
        "names": len({(event["id"], event["created"]) for event in events}),
        "done": done,
    }, first


def counter(url, name):
    for line in recipe.http("GET", url + "/metrics")[1].splitlines():
        if line.startswith(f"mooncake_proxy_{name} "):
            return float(line.split()[1])
    raise ValueError(f"the proxy has no metric {name}")


def front(a, logdir, name, port, P, D, *more):
    argv = [os.environ["MOONCAKE_BINARY"], "proxy", "--model", "tiny", "--port", str(port), "--connector", "store"]
    argv += ["--prefill", P.url, "--decode", D.url, *more]
    started = recipe.Proc(name, argv, recipe.base_env(a), logdir)
    url = f"http://127.0.0.1:{port}"
    recipe.check(f"{name}: ready", recipe.wait_until(lambda: recipe.http("GET", url + "/ready")[0] == 200, 30) is not None)
    return started, url


def kind(url, P, name, more, is_early):
    """One kind of request with every prompt, and the same with its tokens."""
    before, different = counter(url, "early_tokens_total"), []
    for prompt in PROMPTS:
        ids = json.loads(recipe.http("POST", P.url + "/tokenize", {"model": "tiny", "prompt": prompt})[1])["tokens"]
        for asked in (prompt, ids):
            wanted, _ = stream(P.url, asked, more)
            got, _ = stream(url, asked, more)
            if got != wanted:
                different.append((got, wanted))
    early = counter(url, "early_tokens_total") - before
    recipe.check(f"early: {name}: as one instance says", not different, str(different[:1]))
    if is_early:
        # A token that is half a character is not shown.
        recipe.check(f"early: {name}: begins with prefill's token", early > 0, f"{early:g} of {2 * len(PROMPTS)}")
    else:
        recipe.check(f"early: {name}: goes the ordinary way", early == 0, f"{early:g}")


def ended_by_prefill(url, P, D):
    """A token that ends the text at once: whatever comes first is made a stop token."""
    asked = json.loads(recipe.http("POST", D.url + "/tokenize", {"model": "tiny", "prompt": PROMPTS[0]})[1])["tokens"]
    body = {"model": "tiny", "prompt": asked, "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    reply = json.loads(recipe.http("POST", P.url + "/v1/completions", body)[1])
    more = {"stop_token_ids": reply["choices"][0]["token_ids"]}
    counted = D.metric("vllm:request_success_total")
    for options in (None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}):
        asks = {**more, "stream_options": options}
        wanted, _ = stream(P.url, asked, asks)
        got, _ = stream(url, asked, asks)
        recipe.check(f"early: ended by the first token, {options}", got == wanted, f"{got} {wanted}")
    recipe.check("early: decode is not asked then", D.metric("vllm:request_success_total") == counted)


def scenario(a, logdir):
    m = recipe.Master(a, logdir)
    P = recipe.Vllm(a, "P", a.base_port + 111, "kv_producer", m, logdir)
    D = recipe.Vllm(a, "D", a.base_port + 121, "kv_consumer", m, logdir)
    if not all(v.ready(a.start_timeout) for v in (P, D)):
        return
    early, url = front(a, logdir, "proxy-early", a.base_port + 131, P, D, "--early-first-token")
    plain, url_plain = front(a, logdir, "proxy-plain", a.base_port + 132, P, D)
    hits = D.ext_hits()
    for name, more, is_early in KINDS:
        kind(url, P, name, more, is_early)
    recipe.check("early: decode has the prompts from the pool", D.ext_hits() > hits, f"{D.ext_hits() - hits} tokens")
    ended_by_prefill(url, P, D)
    for name, where in (("early", url), ("ordinary", url_plain)):
        times = []
        for prompt in PROMPTS:
            P.reset(), D.reset()
            times.append(stream(where, prompt + " ", {})[1])
        recipe.fact(f"early: median ms to the first event, {name}", round(sorted(times)[len(times) // 2] * 1000, 1))
    for x in (early, plain, P.proc, D.proc, m.proc):
        x.stop()


# The recipe's main finds its scenarios by name.
recipe.scenario_pd = scenario
if __name__ == "__main__":
    sys.exit(recipe.main())
