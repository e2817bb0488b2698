//! What instances say about their own load: vLLM's and SGLang's gauges, read with the health checks.
//!
//! Owns reading a few numbers from a metrics page. They are seconds old, so they only correct the proxy's own exact counts:
//! what an instance runs beyond the requests of this proxy is others' load. The size of its cache does not change.

/// The gauges of a page; what it does not have is `None`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Gauges {
    /// Requests running and waiting.
    pub(crate) requests: Option<f64>,
    /// Share of the KV cache in use, 0 to 1.
    pub(crate) kv_usage: Option<f64>,
    /// Tokens its KV cache has room for.
    pub(crate) cache_tokens: Option<u64>,
}

/// Reads a page. Several engines (data-parallel ranks) are summed, of their cache use the largest counts; or one `rank` is
/// looked at.
pub(crate) fn gauges(page: &str, rank: Option<u32>) -> Gauges {
    let mut found = Gauges::default();
    // `engine` with vLLM, `dp_rank` with SGLang.
    let labels = rank.map(|rank| [format!("engine=\"{rank}\""), format!("dp_rank=\"{rank}\"")]);
    let is_asked = |line: &&str| {
        (line.starts_with("vllm:") || line.starts_with("sglang:"))
            && labels
                .as_ref()
                .is_none_or(|labels| labels.iter().any(|label| line.contains(label)))
    };
    for line in page.lines().filter(is_asked) {
        let name = line.split(['{', ' ']).next().unwrap_or_default();
        let value = line.rsplit(' ').next().and_then(|v| v.parse::<f64>().ok());
        let Some(value) = value.filter(|v| v.is_finite() && *v >= 0.0) else {
            continue;
        };
        match name {
            "vllm:num_requests_running"
            | "vllm:num_requests_waiting"
            | "sglang:num_running_reqs"
            | "sglang:num_queue_reqs" => {
                found.requests = Some(found.requests.unwrap_or(0.0) + value);
            }
            "vllm:cache_config_info" => {
                let number = |label| labelled(line, label);
                let blocks = number("num_gpu_blocks=\"").zip(number("block_size=\""));
                let tokens = blocks.and_then(|(count, size)| count.checked_mul(size));
                // Data-parallel ranks have a cache each.
                if let Some(tokens) = tokens {
                    found.cache_tokens =
                        Some(found.cache_tokens.unwrap_or(0).saturating_add(tokens));
                }
            }
            "vllm:kv_cache_usage_perc" | "vllm:gpu_cache_usage_perc" | "sglang:token_usage" => {
                found.kv_usage = Some(found.kv_usage.unwrap_or(0.0).max(value));
            }
            _ => {}
        }
    }
    found
}

/// The number in a label of a line: `name` with its `="`.
fn labelled(line: &str, name: &str) -> Option<u64> {
    // Not the end of a longer name.
    let is_whole =
        |at: &usize| matches!(line.as_bytes().get(at.wrapping_sub(1)), Some(b'{' | b','));
    let mut places = line.match_indices(name).map(|(at, _)| at);
    let value = &line[places.find(is_whole)? + name.len()..];
    value.split('"').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_numbers_of_many() {
        let page = "# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{engine=\"0\"} 3.0\n\
            vllm:num_requests_running{engine=\"1\"} 1\nvllm:num_requests_waiting{engine=\"0\"} 2\n\
            vllm:num_requests_waiting_by_reason{engine=\"0\"} 7\nvllm:kv_cache_usage_perc{engine=\"0\"} 0.25\n\
            vllm:cache_config_info{block_size=\"16\",engine=\"0\",num_cpu_blocks=\"7\",num_gpu_blocks=\"100\",num_gpu_blocks_override=\"None\"} 1.0\n\
            vllm:cache_config_info{block_size=\"16\",engine=\"1\",num_gpu_blocks=\"None\"} 1.0\n";
        let wanted = Gauges {
            requests: Some(6.0),
            kv_usage: Some(0.25),
            cache_tokens: Some(1600),
        };
        assert_eq!(gauges(page, None), wanted);
        let second = Gauges {
            requests: Some(1.0),
            kv_usage: None,
            cache_tokens: None,
        };
        assert_eq!(gauges(page, Some(1)), second);
        let sglang = "sglang:num_running_reqs{dp_rank=\"0\"} 4\nsglang:num_queue_reqs{dp_rank=\"0\"} 1\nsglang:token_usage{dp_rank=\"1\"} 0.5\n";
        let first = Gauges {
            requests: Some(5.0),
            ..Gauges::default()
        };
        assert_eq!(gauges(sglang, Some(0)), first);
        assert_eq!(gauges(sglang, None).kv_usage, Some(0.5));
        assert_eq!(
            gauges("vllm:num_requests_running NaN\nx 1\n", None),
            Gauges::default()
        );
    }
}
