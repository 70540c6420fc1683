//! A server on this machine that answers as a test tells it to.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// What the server does with a request.
#[derive(Clone, Debug)]
pub(crate) enum Act {
    /// Answers as a model that wrote this text.
    Say(String),
    /// Answers with this status, header lines (each ending in CRLF) and body.
    Status(u16, String, String),
    /// Answers with a part of a response and drops the connection.
    Drop,
    /// Does not answer for this long.
    Hang(Duration),
}

impl Act {
    pub(crate) fn say(text: &str) -> Self {
        Self::Say(text.into())
    }

    pub(crate) fn status(status: u16) -> Self {
        Self::Status(
            status,
            String::new(),
            format!("status {status} says the server"),
        )
    }
}

/// A request as it came.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
    pub(crate) body: Value,
    pub(crate) at: Instant,
}

impl Request {
    /// The question, the last message's text.
    pub(crate) fn question(&self) -> &str {
        self.body["messages"]
            .as_array()
            .and_then(|messages| messages.last())
            .and_then(|message| message["content"].as_str())
            .unwrap()
    }
}

type Script = dyn Fn(usize, &Request) -> Act + Send + Sync;

/// The server; it goes on until the test's process ends.
pub(crate) struct Server {
    pub(crate) url: String,
    requests: Arc<Mutex<Vec<Request>>>,
    script: Arc<Mutex<Arc<Script>>>,
}

impl Server {
    /// Listens on a free port. `script` is told how many requests came before, and the request.
    pub(crate) fn start(script: impl Fn(usize, &Request) -> Act + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let requests = Arc::new(Mutex::new(Vec::new()));
        let script: Arc<Mutex<Arc<Script>>> = Arc::new(Mutex::new(Arc::new(script)));
        let (seen, told) = (Arc::clone(&requests), Arc::clone(&script));
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (seen, told) = (Arc::clone(&seen), Arc::clone(&told));
                thread::spawn(move || serve(stream, &seen, &told));
            }
        });
        Self {
            url,
            requests,
            script,
        }
    }

    /// Answers otherwise from now on.
    pub(crate) fn change(&self, script: impl Fn(usize, &Request) -> Act + Send + Sync + 'static) {
        *self.script.lock().unwrap() = Arc::new(script);
    }

    pub(crate) fn requests(&self) -> Vec<Request> {
        self.requests.lock().unwrap().clone()
    }

    pub(crate) fn n_requests(&self) -> usize {
        self.requests.lock().unwrap().len()
    }
}

/// Reads a request, and answers; a client that has gone away is none of its business.
fn serve(mut stream: TcpStream, seen: &Mutex<Vec<Request>>, script: &Mutex<Arc<Script>>) {
    let Some(request) = read(&stream) else { return };
    let n_before = {
        let mut seen = seen.lock().unwrap();
        seen.push(request.clone());
        seen.len() - 1
    };
    let script = Arc::clone(&script.lock().unwrap());
    let (status, headers, body) = match script(n_before, &request) {
        Act::Say(text) => {
            let message = json!({"role": "assistant", "content": text});
            let body = json!({"choices": [{"index": 0, "message": message}]});
            (200, String::new(), body.to_string())
        }
        Act::Status(status, headers, body) => (status, headers, body),
        Act::Drop => {
            let part = "HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{\"choices\": [{\"mess";
            let _gone = stream.write_all(part.as_bytes());
            return;
        }
        Act::Hang(time) => {
            thread::sleep(time);
            return;
        }
    };
    let response = format!(
        "HTTP/1.1 {status} So\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{headers}\
         Connection: close\r\n\r\n{body}",
        body.len()
    );
    let _gone = stream.write_all(response.as_bytes());
}

fn read(stream: &TcpStream) -> Option<Request> {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).ok()?;
    let path = line.split(' ').nth(1)?.to_string();
    let (mut length, mut authorization) = (0, None);
    loop {
        line.clear();
        reader.read_line(&mut line).ok()?;
        let Some((name, value)) = line.trim_end().split_once(": ") else {
            break;
        };
        match name.to_ascii_lowercase().as_str() {
            "content-length" => length = value.parse().ok()?,
            "authorization" => authorization = Some(value.to_string()),
            _ => {}
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body).ok()?;
    Some(Request {
        path,
        authorization,
        body: serde_json::from_slice(&body).ok()?,
        at: Instant::now(),
    })
}
