"""Scenario `barrier`: two prefill instances and one for decode behind `mooncake proxy --master`, all real vLLM. The proxy hears
the prefill instances' KV events and the master's object events, and holds decode back until the pool has the prompt's blocks:
decode's hit is then full at the first request, which it is not without (vLLM saves while its answer is on its way).

Uses the parts of the recipe's run_e2e.py, whose options it takes; `--proxy-cmd` is not one of them here: $MOONCAKE_BINARY is.
"""

import argparse
import json
import os
import sys
import time
import urllib.request

sys.path.insert(0, os.environ["VLLM_RECIPE"])
import run_e2e as recipe  # noqa: E402

PROMPTS = 6


def instance(a, name, port, role, master, logdir, events=None):
    more = a.vllm_args
    if events is not None:
        # The endpoint must be one that binds; the namespace has loopback only.
        config = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": f"tcp://*:{events}",
            "replay_endpoint": f"tcp://*:{events + 10}",
        }
        more += f" --kv-events-config '{json.dumps(config)}'"
    return recipe.Vllm(argparse.Namespace(**{**vars(a), "vllm_args": more}), name, port, role, master, logdir)


KEY = "barrier-test"


def instances(url):
    request = urllib.request.Request(url + "/instances", headers={"X-API-Key": KEY})
    with urllib.request.urlopen(request, timeout=3) as reply:
        return json.loads(reply.read())


def counter(url, name):
    for line in recipe.http("GET", url + "/metrics")[1].splitlines():
        if line.startswith(f"mooncake_proxy_{name} "):
            return float(line.split()[1])
    raise ValueError(f"the proxy has no metric {name}")


def ask_all(D, P, prompts, url):
    """(all texts equal, [(hit, possible)]) of prompts that nobody has seen, sent through the proxy."""
    same, hits = True, []
    for prompt in prompts:
        before = D.ext_hits()
        text, tokens = D.complete(prompt, url=url)
        same &= text == P.complete(prompt)[0]
        hits.append((D.ext_hits() - before, recipe.full_blocks(tokens) * recipe.BLOCK))
    return same, hits


def proxy(a, logdir, name, port, P, D, master, events, barrier):
    where = ",".join(f"127.0.0.1:{p.port}={e}/{e + 10}" for p, e in zip(P, events, strict=True))
    argv = [os.environ["MOONCAKE_BINARY"], "proxy", "--model", "tiny", "--port", str(port), "--connector", "store"]
    argv += ["--prefill", *(p.url for p in P), "--decode", D.url, "--master", f"127.0.0.1:{master.rpc}"]
    argv += ["--kv-events", where, "--store-barrier", barrier]
    started = recipe.Proc(name, argv, {**recipe.base_env(a), "ADMIN_API_KEY": KEY}, logdir)
    url = f"http://127.0.0.1:{port}"

    def hears():
        feeds = [i for i in instances(url)["instances"] if i["kv_events"]]
        return len(feeds) == len(P) and all(i["kv_events"]["live"] for i in feeds)

    def is_on():
        return json.loads(recipe.http("GET", url + "/status")[1])["store_barrier"] == "on"

    recipe.check(f"{name}: hears the prefill instances' events", recipe.wait_until(hears, 30) is not None)
    recipe.check(f"{name}: hears the master: the barrier is on", recipe.wait_until(is_on, 30) is not None)
    return started, url


def scenario(a, logdir):
    m = recipe.Master(a, logdir)
    events = [a.base_port + 151, a.base_port + 152]
    P = [instance(a, f"P{i}", a.base_port + 111 + i, "kv_producer", m, logdir, events[i]) for i in range(2)]
    D = instance(a, "D0", a.base_port + 121, "kv_consumer", m, logdir)
    if not all(v.ready(a.start_timeout) for v in (*P, D)):
        return
    front, url = proxy(a, logdir, "proxy", a.base_port + 131, P, D, m, events, "5s")
    prompts = [recipe.TEXT[i * 5000 : i * 5000 + 5000] for i in range(PROMPTS)]
    same, hits = ask_all(D, P[0], prompts, url)
    waits, timeouts = counter(url, "barrier_waits_total"), counter(url, "barrier_timeouts_total")
    waited = counter(url, "barrier_seconds_sum")
    recipe.check("barrier: texts through the proxy equal the prefiller's own", same)
    recipe.check("barrier: decode's hit is full at the first request", all(h == n for h, n in hits), str(hits))
    recipe.check("barrier: decode was held back", waits > 0, f"{waits:g} waits of {waited / max(waits, 1) * 1000:.1f} ms on average")
    recipe.check("barrier: never until its time was over", timeouts == 0, f"{timeouts:g} timeouts")
    recipe.check("barrier: both prefillers computed", all(p.ops("save_put") > 0 for p in P))

    # What is in the pool already is not waited for.
    before = counter(url, "barrier_waits_total")
    D.reset()
    h = D.ext_hits()
    _, tokens = D.complete(prompts[0], url=url)
    recipe.check("barrier: a prompt that is there", D.ext_hits() - h == recipe.full_blocks(tokens) * recipe.BLOCK)
    recipe.fact("barrier: waits for it", counter(url, "barrier_waits_total") - before)
    front.stop()

    # Without it, for comparison: not a check, since vLLM may win the race.
    front, url = proxy_without(a, logdir, P, D, m)
    fresh = [recipe.TEXT[i * 5000 + 40000 : i * 5000 + 45000] for i in range(PROMPTS)]
    _, hits = ask_all(D, P[0], fresh, url)
    recipe.fact("without the barrier: (hit, possible)", hits)
    time.sleep(0.5)
    for x in (front, *[v.proc for v in (*P, D)], m.proc):
        x.stop()


def proxy_without(a, logdir, P, D, m):
    port = a.base_port + 132
    argv = [os.environ["MOONCAKE_BINARY"], "proxy", "--model", "tiny", "--port", str(port), "--connector", "store"]
    argv += ["--prefill", *(p.url for p in P), "--decode", D.url]
    started = recipe.Proc("proxy-without", argv, recipe.base_env(a), logdir)
    url = f"http://127.0.0.1:{port}"
    recipe.check("a proxy without a barrier", recipe.wait_until(lambda: recipe.http("GET", url + "/ready")[0] == 200, 30))
    return started, url


# The recipe's main finds its scenarios by name.
recipe.scenario_pd = scenario
if __name__ == "__main__":
    sys.exit(recipe.main())
