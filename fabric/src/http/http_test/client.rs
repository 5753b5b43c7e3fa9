//! A client of a few lines that reads answers byte by byte, so that what the server does to a
//! connection is seen as it is.

use std::io::{BufRead, BufReader, Read, Write};

/// An answer.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }
}

fn header<'a>(headers: &'a [(String, String)], name: &str) -> Option<&'a str> {
    let found = headers.iter().find(|(found, _)| found == name);
    found.map(|(_, value)| value.as_str())
}

pub fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
}

pub fn post(path: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

/// Sends a request and reads the whole answer.
pub fn ask(stream: impl Read + Write, request: &str) -> Answer {
    let mut stream = Stream::open(stream, request);
    let mut body = Vec::new();
    match header(&stream.headers, "content-length") {
        Some(length) => {
            let length = length.parse().unwrap();
            stream.reader.take(length).read_to_end(&mut body).unwrap();
            assert_eq!(body.len() as u64, length);
        }
        None => {
            while let Some(chunk) = stream.chunk() {
                body.extend(chunk);
            }
        }
    }
    Answer {
        status: stream.status,
        headers: stream.headers,
        body,
    }
}

/// An answer that is read line by line, as it comes.
pub struct Stream<S> {
    pub status: u16,
    headers: Vec<(String, String)>,
    reader: BufReader<S>,
    text: Vec<u8>,
}

impl<S: Read + Write> Stream<S> {
    /// Sends a request and reads the head of the answer.
    pub fn open(mut stream: S, request: &str) -> Self {
        // A server that refuses closes before it has read all.
        let _ = stream.write_all(request.as_bytes());
        let mut reader = BufReader::new(stream);
        let mut line = || {
            let mut line = String::new();
            reader.read_line(&mut line).unwrap();
            line.trim_end().to_string()
        };
        let first = line();
        let status = first
            .split(' ')
            .nth(1)
            .unwrap_or_else(|| panic!("{first:?}"));
        let status = status.parse().unwrap();
        let mut headers = Vec::new();
        loop {
            let line = line();
            let Some((name, value)) = line.split_once(": ") else {
                break;
            };
            headers.push((name.to_ascii_lowercase(), value.into()));
        }
        Self {
            status,
            headers,
            reader,
            text: Vec::new(),
        }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        header(&self.headers, name)
    }

    /// The next chunk; `None` after the last one.
    fn chunk(&mut self) -> Option<Vec<u8>> {
        let mut size = String::new();
        self.reader.read_line(&mut size).unwrap();
        let size =
            usize::from_str_radix(size.trim_end(), 16).unwrap_or_else(|_| panic!("{size:?}"));
        let mut chunk = vec![0; size + 2];
        self.reader.read_exact(&mut chunk).unwrap();
        chunk.truncate(size);
        (size > 0).then_some(chunk)
    }

    /// The next line, without its end; `None` after the last one.
    pub fn line(&mut self) -> Option<String> {
        loop {
            if let Some(end) = self.text.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.text.drain(..=end).collect();
                return Some(String::from_utf8(line).unwrap().trim_end().into());
            }
            let more = self.chunk()?;
            self.text.extend(more);
        }
    }
}
