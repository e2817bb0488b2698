//! Replays the seeds of the fuzz targets as an ordinary test, whole, truncated and with single bytes changed.

fn proxy(bytes: &[u8]) {
    use mooncake::proxy::fuzz;
    for target in [fuzz::body, fuzz::http, fuzz::events] {
        target(bytes);
    }
}

#[test]
fn proxy_messages_and_their_neighbours() {
    for text in [
        &br#"{"prompt":"a\"b","max_tokens":5,"stream":true,"stream_options":{"x":[1]}}"#[..],
        br#"{"id":"c","created":1,"model":"m","choices":[{"text":"a","finish_reason":"stop","prompt_token_ids":[1,2],"token_ids":[3]}],"usage":{"prompt_tokens_details":{"cached_tokens":1}}}"#,
        b"data: {\"id\":\"c\",\"created\":1,\"usage\":{\"prompt_tokens\":2,\"completion_tokens\":1,\"prompt_tokens_details\":{\"cached_tokens\":1}}}\n\ndata: [DONE]\n\n",
        b"5;a=b\r\nhello\r\n0\r\nx: y\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n",
    ] {
        for end in 0..=text.len() {
            proxy(&text[..end]);
        }
        for at in 0..text.len() {
            for value in 0..=255 {
                let mut changed = text.to_vec();
                changed[at] = value;
                proxy(&changed);
            }
        }
    }
}

#[test]
fn seeds_and_their_neighbours() {
    let directory = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds");
    let mut count = 0;
    for entry in std::fs::read_dir(directory).unwrap() {
        let bytes = std::fs::read(entry.unwrap().path()).unwrap();
        for end in 0..=bytes.len() {
            mooncake::engine::transport::fuzz_frame(&bytes[..end]);
            mooncake::store::wire::fuzz(&bytes[..end]);
        }
        for at in 0..bytes.len() {
            for flip in [0x01, 0x80, 0xFF] {
                let mut changed = bytes.clone();
                changed[at] ^= flip;
                mooncake::engine::transport::fuzz_frame(&changed);
                mooncake::store::wire::fuzz(&changed);
            }
        }
        count += 1;
    }
    assert!(count >= 3, "the seeds were found");
}
