//! Instances behind a real proxy: down, of another model, of another connector; seen with the admin key and without.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::faults::fault;
use super::strangers::closed_port;
use super::{Fault, Lab, Said};
use crate::pool::Server;

const KEY: &str = "doctors-key";
const MODEL: &str = "org/model";

/// A server that lists one model and is otherwise well.
fn instance(model: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            std::thread::spawn(move || answer(stream, model));
        }
    });
    address
}

fn answer(mut stream: TcpStream, model: &str) {
    let mut piece = [0; 4096];
    while let Ok(n) = stream.read(&mut piece) {
        if n == 0 {
            return;
        }
        let head = String::from_utf8_lossy(&piece[..n]).into_owned();
        let (status, body) = match head.split(' ').nth(1) {
            Some("/health") => ("200 OK", String::new()),
            Some("/v1/models") => ("200 OK", format!(r#"{{"data":[{{"id":"{model}"}}]}}"#)),
            _ => ("404 Not Found", String::new()),
        };
        let text = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        if stream.write_all(text.as_bytes()).is_err() {
            return;
        }
    }
}

/// A proxy with these instances, once it has judged them; examined with the key or without.
fn examined(lab: &Lab, prefill: &str, decode: &str, with_key: bool, more: &[&str]) -> Said {
    let key = lab.place().join("key");
    std::fs::write(&key, KEY).unwrap();
    let key = key.to_str().unwrap();
    let mut arguments = vec![
        "proxy", "-m", MODEL, "-p", prefill, "-d", decode, "--port", "0",
    ];
    arguments.extend(["--health-interval", "100ms", "--admin-key-file", key]);
    arguments.extend_from_slice(more);
    let proxy = Server::start(&arguments);
    let line = proxy.line("http://");
    let url = format!("http://{}", line.split_once("http://").unwrap().1.trim());
    let judged = Instant::now() + Duration::from_secs(10);
    let unjudged = || {
        let address = url.trim_start_matches("http://");
        let out = crate::pool::call(&["inspect", "proxy", address, "--admin-key-file", key]);
        String::from_utf8_lossy(&out.stdout).contains("unknown ")
    };
    std::thread::sleep(Duration::from_millis(500));
    while unjudged() && Instant::now() < judged {
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut ask = vec!["--proxy", url.as_str()];
    if with_key {
        ask.extend(["--proxy-key-file", key]);
    }
    lab.doctor(&ask, &[])
}

pub(super) fn all() -> Vec<Fault> {
    let area = "Instances behind a proxy";
    vec![
        fault!(
            area,
            "a decode instance is down, as the proxy sees it",
            ("instance", "fail", "instance_down"),
            &[],
            |lab| examined(
                lab,
                &instance(MODEL),
                &closed_port(),
                true,
                &["--connector", "store"]
            )
        ),
        fault!(
            area,
            "a prefill instance is down, asked without the key",
            ("instance", "fail", "instance_down"),
            &[],
            |lab| examined(
                lab,
                &closed_port(),
                &instance(MODEL),
                false,
                &["--connector", "store"]
            )
        ),
        fault!(
            area,
            "an instance serves another model, as the proxy sees it",
            ("instance", "fail", "model_mismatch"),
            &[],
            |lab| examined(
                lab,
                &instance(MODEL),
                &instance("org/other"),
                true,
                &["--connector", "store"]
            )
        ),
        fault!(
            area,
            "instances serve different models, asked without the key",
            ("models", "fail", "model_mismatch"),
            &[],
            |lab| examined(
                lab,
                &instance(MODEL),
                &instance("org/other"),
                false,
                &["--connector", "store"]
            )
        ),
        fault!(
            area,
            "another admin key than the proxy's",
            ("instances", "fail", "admin_key"),
            &[],
            |lab| {
                let proxy = Server::start(&[
                    "proxy",
                    "-m",
                    MODEL,
                    "-p",
                    &instance(MODEL),
                    "-d",
                    &instance(MODEL),
                    "--port",
                    "0",
                    "--admin-key-file",
                    &file(lab, KEY),
                ]);
                let line = proxy.line("http://");
                let url = format!("http://{}", line.split_once("http://").unwrap().1.trim());
                lab.doctor(
                    &["--proxy", &url, "--proxy-key-file", &file(lab, "another")],
                    &[],
                )
            }
        ),
    ]
}

fn file(lab: &Lab, text: &str) -> String {
    let path = lab.place().join("key");
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}
