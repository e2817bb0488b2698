# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_mooncake_global_optspecs
    string join \n h/help V/version
end

function __fish_mooncake_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_mooncake_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_mooncake_using_subcommand
    set -l cmd (__fish_mooncake_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c mooncake -n "__fish_mooncake_needs_command" -s h -l help -d 'Print help'
complete -c mooncake -n "__fish_mooncake_needs_command" -s V -l version -d 'Print version'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "master" -d 'Run the master: the index of a pool (with --memory, a whole pool)'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "node" -d 'Run a node: lend memory of this host to a pool'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "proxy" -d 'Run an OpenAI-compatible front for prefill and decode instances (XpYd)'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "put" -d 'Store a file or standard input under a key, or many files'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "get" -d 'Write an object to a file or standard output'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "exist" -d 'Say whether keys are in the pool (exit code 1 when one is not)'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "ls" -d 'List keys, in no particular order'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "rm" -d 'Remove keys; returns when the nodes have forgotten them'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "stat" -d 'Show size, version, checksum, lease, pins and replicas of a key'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "inspect" -d 'Look at a pool: overview, nodes, segments, keys, tenants, events, a proxy'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "drain" -d 'Move everything off segments; they take nothing new, readers notice nothing'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "doctor" -d 'Find out why parts of a pool do not work together, and say the fix'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "bench" -d 'Measure: put, get and exist beside the machine\'s limits and Redis; the master alone'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "generate" -d 'Write shell completions and man pages'
complete -c mooncake -n "__fish_mooncake_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l config -d 'Read settings from a TOML or JSON file' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l port -d 'Port for gRPC, HTTP and control lanes; 0 = any free one [default: 50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l bind -d 'Address to listen on; beyond loopback only when told so [default: 127.0.0.1]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN); required of everybody then' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l memory -d 'Also host an embedded node with this much memory [default: 0]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l node-port -d 'Data port of the embedded node; 0 = any free one [default: 0]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l advertise -d 'HOST or HOST:PORT under which clients reach the embedded node, when it is not --bind' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l metrics-port -d 'Second HTTP listener for tools that expect upstream\'s port; `off` = none [default: 9003]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l metrics-host -d 'Address of the second HTTP listener [default: 127.0.0.1]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l enable-metric-reporting -d 'Log a summary every 10 s [default: true]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l default-kv-lease-ttl -d 'Lease granted by get and exist; a bare number is milliseconds [default: 10s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l max-kv-soft-pin-ttl -d 'Longest soft pin accepted; a bare number is milliseconds [default: 24h]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l allow-evict-soft-pinned-objects -d 'Evict soft-pinned objects when nothing else is left [default: true]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l eviction-high-watermark-ratio -d 'Share of the capacity above which eviction runs [default: 0.90]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l eviction-ratio -d 'Share of the capacity that a round of eviction frees [default: 0.05]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l enable-multi-tenants -d 'Let in only tenants that have a quota (/api/v1/tenant_quotas); quotas hold either way [default: false]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l eviction-policy -d 'What is evicted first: sieve, lru [default: sieve]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l allocation-strategy -d 'Where replicas are placed: random, free_ratio_first, local_first [default: random]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l client-ttl -d 'A node silent for this long is unmounted; a bare number is seconds [default: 10s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l put-start-release-timeout -d 'An unfinished put is reclaimed after this; a bare number is seconds [default: 600s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l put-wait -d 'How long a put waits for space when its client names no deadline [default: 2s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l recovery-grace -d 'After the start, absence is not answered for this long: nodes may still be on their way [default: 1s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events -d 'Record what is stored and removed, for subscribers (GET /events, gRPC, --kv-events-endpoint) [default: true]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-queue-capacity -d 'Events kept for replay, and at most 256 bytes of key each on average [default: 65536]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-endpoint -d 'Publish the events over ZeroMQ as well, PUB and replay on one port: tcp://HOST:PORT' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-backend-id -d 'This pool\'s name in published events [default: mooncake]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-emit-legacy-compat -d 'Published events also carry the names engines use: type, block_hashes [default: true]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-emit-object-key -d 'Published events carry the key as text [default: true]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l max-lanes -d 'Control lanes open at once; as many data lanes of the embedded node [default: 4096]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l slow-log -d 'Log operations that take longer, with what they waited for; 0 = none [default: 1s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l log-format -d 'How log lines look: text, json [default: text]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l max-threads -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l rpc-conn-timeout-seconds -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l rpc-enable-tcp-no-delay -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l rpc-interface -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l memory-allocator -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l cluster-id -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l default-kv-soft-pin-ttl -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l put-start-discard-timeout-sec -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l logtostderr -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l enable-http-metadata-server -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l http-metadata-server-host -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l http-metadata-server-port -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l enable-metadata-cleanup-on-timeout -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l enable-gc -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-model-name -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-tenant-id -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-additional-salt -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-lora-name -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-block-size -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l kv-events-dp-rank -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l v -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -l print-config -d 'Print every setting with its value and where it came from, and stop'
complete -c mooncake -n "__fish_mooncake_using_subcommand master" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l config -d 'Read settings from a TOML or JSON file' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l master -d 'HOST:PORT of the master [default: 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l memory -d 'Memory to contribute [default: 4GiB]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l segments -d 'Number of segments the memory is split into [default: 1]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l bind -d 'Address to listen on for data; beyond loopback only when told so [default: 127.0.0.1]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l port -d 'Port for data; 0 = any free one [default: 0]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l advertise -d 'HOST or HOST:PORT that others connect to, when it is not --bind' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l name -d 'Name of this node [default: its address]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l populate -d 'Touch all memory in the background after the start [default: true]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l max-lanes -d 'Data lanes open at once [default: 4096]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l drain-timeout -d 'How long a stop moves objects that lie only here to other nodes; 0 = not at all; a bare number is seconds [default: 10s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l log-format -d 'How log lines look: text, json [default: text]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l protocol -d 'Whether callers may have bytes moved by RDMA; auto = where there is a device: auto, rdma, tcp [default: auto]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l device-name -d 'RDMA devices to use, a comma list [default: all]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l metadata-server -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l threads -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l tenant-id -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l local-buffer-size -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l logtostderr -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l v -d '' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -l print-config -d 'Print every setting with its value and where it came from, and stop'
complete -c mooncake -n "__fish_mooncake_using_subcommand node" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l config -d 'Read settings from a TOML or JSON file' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l data-parallel-size -d 'Data-parallel ranks of every instance: each is routed to by itself (X-data-parallel-rank) and has its own KV events port [default: 1]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l bind -d 'Address to listen on; beyond loopback only when told so [default: 127.0.0.1]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l port -d 'Port; 0 = any free one [default: 8000]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l scheduling -d 'Who gets a request: round_robin, random, least_loaded, p2c, session, prefix, cost, kv [default: round_robin]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l prefill-scheduling -d 'The same for prefill only [default: --scheduling]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l decode-scheduling -d 'The same for decode only [default: --scheduling]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l connector -d 'How KV gets from prefill to decode; auto finds out per instance (not p2p): auto, store, mooncake, nixl, sglang, p2p, none [default: auto]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l kv-events -d 'Where instances publish KV events: [INSTANCE=]PORT[/REPLAY_PORT], a list; without INSTANCE= for all others' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l master -d 'HOST:PORT of the pool\'s master: its object events tell what is in the pool' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l token-file -d 'File with the cluster token for the master (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l tokenize -d 'Policy kv: ask workers\' /tokenize for the tokens of new texts; no request waits for it: background, off [default: background]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l store-barrier -d 'Connector store: longest wait for the prompt\'s last block to be readable before decode starts; 0 = none [default: 20ms]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l agg -d 'No prefill leg at all: every instance of --decode does both [default: false]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l prefill-down -d 'When no prefill instance is available: answer 503, or let decode compute the prompt: refuse, decode [default: refuse]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l prefill-min-tokens -d 'Prompts with fewer tokens than this (estimated; cached ones not counted) skip prefill [default: 0]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l upstream-auth -d 'Authorization for instances: the client\'s (else OPENAI_API_KEY), always OPENAI_API_KEY, none: passthrough, env, none [default: passthrough]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l admin-key-file -d 'File with the key of /instances requests (or ADMIN_API_KEY)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l prefill-timeout -d 'Bound of a prefill leg [default: 10m]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l first-token-timeout -d 'Bound of decode until the first byte of its answer [default: 10m]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l idle-timeout -d 'Longest silence within an answer [default: 5m]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l client-timeout -d 'How long a client may neither send nor read what is due [default: 30s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l queue-timeout -d 'How long a request waits for a place before it is refused [default: 10s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l max-inflight -d 'Requests under way [default: 4096]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l max-queue -d 'Requests waiting for a place [default: 1024]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l max-per-instance -d 'Requests under way per instance and role; 0 = no limit [default: 0]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l max-handoffs -d 'Hand-offs under way per prefill instance, from prefill\'s start to decode\'s first byte; 0 = no limit [default: 0]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l max-handoffs-per-pair -d 'The same per pair of a prefill and a decode instance [default: 0]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l discover -d 'Where more instances are found, looked at every 5 s: [ROLE=]dns:NAME:PORT, file:PATH (JSON), a list; or zmq:IP:PORT, where they register (P2pNcclConnector)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l max-connections -d 'Client connections [default: 16384]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l max-body -d 'Largest request body [default: 64MiB]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l retries -d 'Retries per leg, within the retry budget [default: 2]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l continue -d 'When a decode instance dies in a streamed completion, let another go on from what the client has [default: false]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l early-first-token -d 'Pass prefill\'s token on before decode is asked (streamed /v1/completions through the store) [default: false]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l health-interval -d 'Between health checks [default: 2s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l state-file -d 'File that remembers added instances across restarts' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l access-log -d 'File for a JSON line per request; - = standard error' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l debug-headers -d 'Name the chosen instances in reply headers (x-mooncake-prefill, -decode, -route-reason) [default: false]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l trust-kv-params -d 'Pass on what clients say about where KV is (kv_transfer_params\' remote_*, bootstrap_*, request ids of p2p) instead of refusing it [default: false]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l threads -d 'Threads that serve clients, each with a listener of its own [default: 1]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l drain-timeout -d 'How long requests under way may take to end after SIGTERM [default: 30s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l log-format -d 'How log lines look: text, json [default: text]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -s m -l model -d 'Model that the instances serve' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -s p -l prefill -d 'Prefill instances: HOST:PORT, HOST:PORT:BOOTSTRAP, [IPV6]:PORT, http://HOST:PORT' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -s d -l decode -d 'Decode instances, written alike' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -l print-config -d 'Print every setting with its value and where it came from, and stop'
complete -c mooncake -n "__fish_mooncake_using_subcommand proxy" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -s r -l recursive -d 'Store every file below DIR; keys are the paths below it' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l files -d 'Store several files; keys are the paths as given' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l prefix -d 'Put this before every key' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l replicas -d 'Copies on distinct nodes, best effort' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l soft-pin -d 'Keep until nothing else can be evicted, for TIME [default: 30m]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l preferred-segment -d 'Place there if possible; may be repeated' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l group -d 'Lease and evict together with the others of this group' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l hard-pin -d 'Never evict'
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -l upsert -d 'Replace what is stored under the key (otherwise it is left as it is)'
complete -c mooncake -n "__fish_mooncake_using_subcommand put" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand get" -s o -l out -d 'Where to; replaced only when everything has arrived [default: standard output]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand get" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand get" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand get" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand get" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand get" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand get" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand get" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand get" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand exist" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand exist" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand exist" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand exist" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand exist" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand exist" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand exist" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand exist" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -l regex -d 'Only keys that match' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -l limit -d 'Stop after this many' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -s l -l long -d 'With size, replicas and version'
complete -c mooncake -n "__fish_mooncake_using_subcommand ls" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -l regex -d 'Remove every key that matches' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -l all -d 'Remove every key of the tenant'
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -l force -d 'Remove leased objects too'
complete -c mooncake -n "__fish_mooncake_using_subcommand rm" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand stat" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand stat" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand stat" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand stat" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand stat" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand stat" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand stat" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand stat" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -l watch -d 'Show it again every TIME, in place on a terminal [default of a bare --watch: 1s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -l count -d 'End after so many times' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "nodes" -d 'Nodes with their state and release'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "segments" -d 'Segments with occupancy, fragmentation and a map of what is used'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "keys" -d 'Keys with size, replicas and lease, a page at a time'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "key" -d 'One key: replicas, lease, pins, version, checksum, and what happened to it'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "tenants" -d 'Tenants with what they hold and their hit rate'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "hot" -d 'What was read most lately: first keys of batches'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "events" -d 'Follow what is stored and removed, as it happens, also over a restart of the master; JSON is one event per line'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "top" -d 'Rates, memory and segments, refreshed like top'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "diff" -d 'What changed between two moments: two files of `inspect --output json`, or now and --interval later'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "proxy" -d 'Instances of a running proxy: state, load, last error'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and not __fish_seen_subcommand_from nodes segments keys key tenants hot events top diff proxy help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from nodes" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from nodes" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from nodes" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from nodes" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from nodes" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from nodes" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from nodes" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from nodes" -l watch -d 'Show it again every TIME, in place on a terminal [default of a bare --watch: 1s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from nodes" -l count -d 'End after so many times' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from nodes" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from segments" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from segments" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from segments" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from segments" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from segments" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from segments" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from segments" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from segments" -l watch -d 'Show it again every TIME, in place on a terminal [default of a bare --watch: 1s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from segments" -l count -d 'End after so many times' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from segments" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l prefix -d 'Only keys that begin so' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l sort -d 'size: largest first; heat: read last first, what nobody has read at the end; age: written first first (by version)' -r -f -a "none\t''
key\t''
size\t''
heat\t''
age\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l limit -d 'Keys of one page' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l cursor -d 'Go on where the last page ended (not with heat and age, which have one page)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from keys" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from key" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from key" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from key" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from key" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from key" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from key" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from key" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from key" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from tenants" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from tenants" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from tenants" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from tenants" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from tenants" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from tenants" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from tenants" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from tenants" -l watch -d 'Show it again every TIME, in place on a terminal [default of a bare --watch: 1s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from tenants" -l count -d 'End after so many times' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from tenants" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from hot" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from hot" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from hot" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from hot" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from hot" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from hot" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from hot" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from hot" -l watch -d 'Show it again every TIME, in place on a terminal [default of a bare --watch: 1s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from hot" -l count -d 'End after so many times' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from hot" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l from -d 'Begin with this event; 1 = the oldest that is kept, 0 = those that happen from now on' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l prefix -d 'Only keys that begin so' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l count -d 'End after so many events' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l for -d 'End after this time; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from events" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from top" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from top" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from top" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from top" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from top" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from top" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from top" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from top" -l watch -d 'Show it again every TIME, in place on a terminal [default of a bare --watch: 1s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from top" -l count -d 'End after so many times' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from top" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from diff" -l interval -d 'Ask now and after this time [default: 10s]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from diff" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from diff" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from diff" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from diff" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from diff" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from diff" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from diff" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from diff" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from proxy" -l admin-key-file -d 'File with the proxy\'s admin key (or ADMIN_API_KEY)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from proxy" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from proxy" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "nodes" -d 'Nodes with their state and release'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "segments" -d 'Segments with occupancy, fragmentation and a map of what is used'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "keys" -d 'Keys with size, replicas and lease, a page at a time'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "key" -d 'One key: replicas, lease, pins, version, checksum, and what happened to it'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "tenants" -d 'Tenants with what they hold and their hit rate'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "hot" -d 'What was read most lately: first keys of batches'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "events" -d 'Follow what is stored and removed, as it happens, also over a restart of the master; JSON is one event per line'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "top" -d 'Rates, memory and segments, refreshed like top'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "diff" -d 'What changed between two moments: two files of `inspect --output json`, or now and --interval later'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "proxy" -d 'Instances of a running proxy: state, load, last error'
complete -c mooncake -n "__fish_mooncake_using_subcommand inspect; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l to -d 'Segments or nodes that take it [default: any]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l concurrency -d 'Transfers at once; small objects travel together' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l wait -d 'How long to wait for the end; 0 = print the job and return; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l job -d 'Look at a job that was begun before, and wait for it' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l tenant -d 'Namespace of the keys [default: tenant_id of mooncake.json, else `default`]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l transport -d 'Use only this transport for data; rdma: TCP where RDMA fails' -r -f -a "shm\t''
rdma\t''
tcp\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l timeout -d 'Bound of one operation; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -l cancel -d 'Cancel it: what was moved stays moved, the segments take new objects again'
complete -c mooncake -n "__fish_mooncake_using_subcommand drain" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l master -d 'Master [default: from mooncake.json or MOONCAKE_MASTER, else 127.0.0.1:50051]' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l config -d 'mooncake.json [default: MOONCAKE_CONFIG_PATH, else ./mooncake.json if it is there]' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l token-file -d 'File with the cluster token (or MOONCAKE_TOKEN)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l proxy -d 'Also check this proxy' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l proxy-key-file -d 'File with the proxy\'s admin key (or ADMIN_API_KEY): what it knows of its instances' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l peer -d 'Also check this data port of a node; may be given several times' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l mesh-timeout -d 'Bound of --mesh; a bare number is seconds' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l root -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l mesh -d 'Also have every node test the way to every other: latency, bandwidth, what is odd'
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l rdma -d 'RDMA is wanted: its absence is a fault'
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -l fix -d 'Print the commands that mend what was found, and nothing else; none is run'
complete -c mooncake -n "__fish_mooncake_using_subcommand doctor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and not __fish_seen_subcommand_from store master peer help" -s h -l help -d 'Print help'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and not __fish_seen_subcommand_from store master peer help" -f -a "store" -d 'Measure put, get and exist, beside memcpy, bare TCP and Redis, in one run'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and not __fish_seen_subcommand_from store master peer help" -f -a "master" -d 'Measure the master: exist batches, single operations, memory, eviction, start'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and not __fish_seen_subcommand_from store master peer help" -f -a "peer" -d 'The other end of bare TCP figures'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and not __fish_seen_subcommand_from store master peer help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l sizes -d 'Object sizes' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l batches -d 'Keys per call (a call has at most 64 MiB)' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l paths -d 'Segment in this process, in another one of this host, over TCP' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l ops -d 'Operations' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l rounds -d 'Rounds; the sides take turns within each' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l time -d 'Time of one side in one round' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l memory -d 'Memory of the pool, and of Redis' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l buffers -d 'The caller\'s buffers, also memcpy\'s: the same few each time, or taken in turn from 256 MiB' -r -f -a "hot\t''
cold\t''"
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l vs -d 'Also run the same work against Redis; without an address a redis-server is started' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l export -d 'Also write the table to FILE (.md or .json)' -r -F
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -l checksum -d 'Compute and verify CRC-32C in our client'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from store" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from master" -l objects -d 'Numbers of objects at which to measure, ascending' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from master" -l rounds -d 'Rounds per figure' -r
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from master" -l output -d 'How to print the result' -r -f -a "text\t'For people'
json\t'One JSON document'"
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from master" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from peer" -s h -l help -d 'Print help'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from help" -f -a "store" -d 'Measure put, get and exist, beside memcpy, bare TCP and Redis, in one run'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from help" -f -a "master" -d 'Measure the master: exist batches, single operations, memory, eviction, start'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from help" -f -a "peer" -d 'The other end of bare TCP figures'
complete -c mooncake -n "__fish_mooncake_using_subcommand bench; and __fish_seen_subcommand_from help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c mooncake -n "__fish_mooncake_using_subcommand generate" -s h -l help -d 'Print help'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "master" -d 'Run the master: the index of a pool (with --memory, a whole pool)'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "node" -d 'Run a node: lend memory of this host to a pool'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "proxy" -d 'Run an OpenAI-compatible front for prefill and decode instances (XpYd)'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "put" -d 'Store a file or standard input under a key, or many files'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "get" -d 'Write an object to a file or standard output'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "exist" -d 'Say whether keys are in the pool (exit code 1 when one is not)'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "ls" -d 'List keys, in no particular order'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "rm" -d 'Remove keys; returns when the nodes have forgotten them'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "stat" -d 'Show size, version, checksum, lease, pins and replicas of a key'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "inspect" -d 'Look at a pool: overview, nodes, segments, keys, tenants, events, a proxy'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "drain" -d 'Move everything off segments; they take nothing new, readers notice nothing'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "doctor" -d 'Find out why parts of a pool do not work together, and say the fix'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "bench" -d 'Measure: put, get and exist beside the machine\'s limits and Redis; the master alone'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "generate" -d 'Write shell completions and man pages'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and not __fish_seen_subcommand_from master node proxy put get exist ls rm stat inspect drain doctor bench generate help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from inspect" -f -a "nodes" -d 'Nodes with their state and release'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from inspect" -f -a "segments" -d 'Segments with occupancy, fragmentation and a map of what is used'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from inspect" -f -a "keys" -d 'Keys with size, replicas and lease, a page at a time'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from inspect" -f -a "key" -d 'One key: replicas, lease, pins, version, checksum, and what happened to it'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from inspect" -f -a "tenants" -d 'Tenants with what they hold and their hit rate'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from inspect" -f -a "hot" -d 'What was read most lately: first keys of batches'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from inspect" -f -a "events" -d 'Follow what is stored and removed, as it happens, also over a restart of the master; JSON is one event per line'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from inspect" -f -a "top" -d 'Rates, memory and segments, refreshed like top'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from inspect" -f -a "diff" -d 'What changed between two moments: two files of `inspect --output json`, or now and --interval later'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from inspect" -f -a "proxy" -d 'Instances of a running proxy: state, load, last error'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from bench" -f -a "store" -d 'Measure put, get and exist, beside memcpy, bare TCP and Redis, in one run'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from bench" -f -a "master" -d 'Measure the master: exist batches, single operations, memory, eviction, start'
complete -c mooncake -n "__fish_mooncake_using_subcommand help; and __fish_seen_subcommand_from bench" -f -a "peer" -d 'The other end of bare TCP figures'
