//! What Python sees: `train` and `split`.
//!
//! The calling thread draws texts from the iterator, copies them into batches of about 1 MiB and hands these to counting
//! threads that need no GIL; the queue between them is bounded, and so is the memory for text, whatever the corpus.
//! It never waits for more than a tenth of a second without looking for Ctrl-C.

use crate::{count::Counter, merge, split};
use crossbeam_channel::{bounded, Receiver, SendTimeoutError, Sender};
use pyo3::exceptions::{PyOSError, PyTypeError, PyUnicodeEncodeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyString;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

const BATCH: usize = 1 << 20; // bytes of text handed over at once
const PATIENCE: Duration = Duration::from_millis(100);

/// Texts behind one another, with the place where each ends.
#[derive(Default)]
struct Batch {
    text: String,
    ends: Vec<usize>,
}

impl Batch {
    fn push(&mut self, text: &str) {
        self.text.push_str(text);
        self.ends.push(self.text.len());
    }

    fn count(&self, counter: &mut Counter) {
        let mut start = 0;
        for &end in &self.ends {
            counter.add_text(&self.text[start..end]);
            start = end;
        }
    }
}

/// Looks for signals and reports progress, at most once per PATIENCE.
struct Watch {
    progress: Option<Py<PyAny>>,
    last: Instant,
}

impl Watch {
    fn look(&mut self, py: Python, stage: &str, done: usize, total: Option<usize>) -> PyResult<()> {
        if self.last.elapsed() >= PATIENCE {
            self.report(py, stage, done, total)?;
        }
        Ok(())
    }

    fn report(&mut self, py: Python, stage: &str, done: usize, total: Option<usize>) -> PyResult<()> {
        self.last = Instant::now();
        py.check_signals()?;
        if let Some(progress) = &self.progress {
            progress.call1(py, (stage, done, total))?;
        }
        Ok(())
    }
}

fn count_batches(batches: Receiver<Batch>) -> Counter {
    let mut counter = Counter::new();
    for batch in batches {
        batch.count(&mut counter);
    }
    counter
}

/// As many counting threads. Where the system refuses one, those that run end by themselves: their queue is gone with the error.
fn start(threads: usize, batches: Receiver<Batch>) -> PyResult<Vec<JoinHandle<Counter>>> {
    let spawn = |number: usize| {
        let batches = batches.clone();
        std::thread::Builder::new().spawn(move || count_batches(batches)).map_err(|error| {
            PyOSError::new_err(format!("the system starts no more than {number} of {threads} threads ({error}): ask for fewer"))
        })
    };
    (0..threads).map(spawn).collect()
}

fn send(py: Python, queue: &Sender<Batch>, mut batch: Batch) -> PyResult<()> {
    loop {
        match py.detach(|| queue.send_timeout(batch, PATIENCE)) {
            Ok(()) => return Ok(()),
            Err(SendTimeoutError::Timeout(back)) => batch = back,
            Err(SendTimeoutError::Disconnected(_)) => unreachable!("counters live until the queue is closed"),
        }
        py.check_signals()?;
    }
}

/// Draw every text and queue it. Returns the number of bytes.
fn feed(py: Python, texts: &Bound<PyAny>, queue: &Sender<Batch>, watch: &mut Watch) -> PyResult<usize> {
    let (mut batch, mut bytes) = (Batch::default(), 0);
    for (number, text) in texts.try_iter()?.enumerate() {
        let text = text?;
        let mut text = utf8(&text, number)?;
        bytes += text.len();
        while !text.is_empty() {
            let (part, rest) = text.split_at(split::safe_cut(text, BATCH));
            batch.push(part);
            text = rest;
            if batch.text.len() >= BATCH {
                send(py, queue, std::mem::take(&mut batch))?;
                watch.look(py, "count", bytes, None)?;
            }
        }
    }
    send(py, queue, batch)?;
    Ok(bytes)
}

fn utf8<'a>(text: &'a Bound<PyAny>, number: usize) -> PyResult<&'a str> {
    let Ok(string) = text.cast::<PyString>() else {
        return Err(PyTypeError::new_err(format!("text {number} is of type {}, expected str", text.get_type().name()?)));
    };
    string.to_str().map_err(|error| {
        if !error.is_instance_of::<PyUnicodeEncodeError>(text.py()) {
            return error;
        }
        let at = error.value(text.py()).getattr("start").map(|at| at.to_string()).unwrap_or_default();
        PyValueError::new_err(format!(
            "text {number} holds a lone surrogate at character {at}, which has no UTF-8 form: read it with errors=\"replace\""
        ))
    })
}

fn join(py: Python, workers: Vec<JoinHandle<Counter>>, watch: &mut Watch, bytes: usize) -> PyResult<Vec<Counter>> {
    while !workers.iter().all(|worker| worker.is_finished()) {
        py.detach(|| std::thread::sleep(Duration::from_millis(1)));
        watch.look(py, "count", bytes, None)?;
    }
    Ok(workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))).collect())
}

/// train(texts, merges, threads=None, progress=None) -> [(left id, right id), ...]
///
/// The merges of a byte-level BPE over an iterator of str: 0..255 are the bytes, 256 + i is merge i. The pair with the
/// highest count comes first, of equals the smallest. Each str is a text of its own. Fewer merges than asked for come
/// back when pairs run out. The result does not depend on `threads` (None = every core).
///
/// progress(stage, done, total) is called about ten times a second: stage "count" in bytes (total None), then "merge".
#[pyfunction]
#[pyo3(signature = (texts, merges, threads=None, progress=None))]
fn train(
    py: Python,
    texts: &Bound<PyAny>,
    merges: usize,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Vec<(u32, u32)>> {
    if texts.is_instance_of::<PyString>() {
        return Err(PyTypeError::new_err("texts is one str, expected an iterator of str: put it in a list"));
    }
    let threads = match threads {
        Some(0) => return Err(PyValueError::new_err("threads is 0, expected at least 1 (None = every core)")),
        Some(threads) => threads,
        None => std::thread::available_parallelism().map_or(1, |n| n.get()),
    };
    if merges > (u32::MAX / 2) as usize {
        return Err(PyValueError::new_err(format!("{merges} merges asked for, expected less than 2^31")));
    }
    let mut watch = Watch { progress, last: Instant::now() };

    let (queue, batches) = bounded(threads.min(64)); // 64 MiB of text, however many threads
    let workers = start(threads, batches)?;
    let fed = feed(py, texts, &queue, &mut watch);
    drop(queue); // on success and on failure alike: the counters run dry and end
    let bytes = fed?;
    let mut counters = join(py, workers, &mut watch, bytes)?;
    watch.report(py, "count", bytes, Some(bytes))?;

    let mut failure = None;
    let result = py.detach(|| {
        counters.sort_by_key(|counter| counter.len());
        let mut total = counters.pop().expect("at least one thread");
        for counter in counters {
            total.absorb(counter);
        }
        merge::merges(total, merges, &mut |done, most| {
            if watch.last.elapsed() >= PATIENCE {
                failure = Python::attach(|py| watch.report(py, "merge", done, Some(most))).err();
            }
            failure.is_none()
        })
    });
    match result {
        Ok(result) => {
            watch.report(py, "merge", result.len(), Some(merges))?;
            Ok(result)
        }
        Err(merge::Stop::Asked) => Err(failure.expect("only a failure asks to stop")),
        Err(merge::Stop::TooLarge(size)) => Err(PyValueError::new_err(format!(
            "the text has {:.1} GB of distinct pieces, expected less than 4.3: train on less of it",
            size as f64 / 1e9
        ))),
    }
}

/// split(text) -> the pieces that merges never cross, in order; together they are the text.
#[pyfunction]
fn split_text<'a>(text: &'a Bound<'a, PyAny>) -> PyResult<Vec<&'a str>> {
    let text = utf8(text, 0)?;
    Ok(split::pieces(text).map(|piece| std::str::from_utf8(piece).expect("pieces end between characters")).collect())
}

#[pymodule]
fn rustbpe(module: &Bound<PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(train, module)?)?;
    module.add_function(wrap_pyfunction!(split_text, module)?)
}
