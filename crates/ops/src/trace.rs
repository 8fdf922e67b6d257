//! Where a step's time goes: spans of ops and stages with the least that they could cost.
//!
//! Off unless [`start`] was called; then every op of this crate and every stage of the trainer notes when it ran, on which
//! thread, and the arithmetic and memory traffic that it cannot do without. Off, a span costs one relaxed load.

use std::borrow::Cow;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Instant;

/// What an op cannot do without.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Cost {
    /// Floating-point operations; a multiply-add is two.
    pub flops: f64,
    /// Bytes read and written, each operand once.
    pub bytes: f64,
}

impl Cost {
    /// Of a pass over memory.
    pub fn bytes(bytes: usize) -> Self {
        Self { flops: 0.0, bytes: bytes as f64 }
    }
}

/// What a span is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// One op, forward or backward. Ops contain each other only within `composed_of`.
    Op,
    /// A stage of a model, or another part of a step; contains ops.
    Stage,
}

/// A span that has ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Event {
    /// What ran.
    pub name: Cow<'static, str>,
    /// Op or stage.
    pub kind: Kind,
    /// Whether it ran backward.
    pub backward: bool,
    /// Microseconds from [`start`].
    pub start_us: f64,
    /// Microseconds that it took.
    pub duration_us: f64,
    /// A number for the thread, from 0.
    pub thread: u64,
    /// The least that it could cost.
    pub cost: Cost,
}

static ON: AtomicBool = AtomicBool::new(false);
static THREADS: AtomicU64 = AtomicU64::new(0);

thread_local! {
    static THREAD: u64 = THREADS.fetch_add(1, Ordering::Relaxed);
}

struct Log {
    start: Instant,
    events: Vec<Event>,
}

fn log() -> &'static Mutex<Log> {
    static LOG: OnceLock<Mutex<Log>> = OnceLock::new();
    LOG.get_or_init(|| Mutex::new(Log { start: Instant::now(), events: vec![] }))
}

/// Notes spans from now on, over all threads of the process.
pub fn start() {
    if let Ok(mut log) = log().lock() {
        *log = Log { start: Instant::now(), events: vec![] };
    }
    ON.store(true, Ordering::Release);
}

/// Ends it, and returns what was noted, in the order in which the spans ended.
pub fn stop() -> Vec<Event> {
    ON.store(false, Ordering::Release);
    log().lock().map(|mut log| std::mem::take(&mut log.events)).unwrap_or_default()
}

/// Ends when dropped.
#[must_use = "a span ends when it is dropped"]
pub struct Span(Option<Open>);

struct Open {
    name: Cow<'static, str>,
    kind: Kind,
    backward: bool,
    cost: Cost,
    start: Instant,
}

/// The forward of an op. `cost` is asked for only if spans are noted.
pub fn op(name: &'static str, cost: impl FnOnce() -> Cost) -> Span {
    open(|| (name.into(), Kind::Op, false, cost()))
}

/// The backward of an op.
pub(crate) fn op_backward(name: &'static str, cost: impl FnOnce() -> Cost) -> Span {
    open(|| (name.into(), Kind::Op, true, cost()))
}

/// A stage of a model or another part of a step.
pub fn stage(backward: bool, name: impl FnOnce() -> Cow<'static, str>) -> Span {
    open(|| (name(), Kind::Stage, backward, Cost::default()))
}

fn open(what: impl FnOnce() -> (Cow<'static, str>, Kind, bool, Cost)) -> Span {
    if !ON.load(Ordering::Relaxed) {
        return Span(None);
    }
    let (name, kind, backward, cost) = what();
    Span(Some(Open { name, kind, backward, cost, start: Instant::now() }))
}

impl Drop for Span {
    fn drop(&mut self) {
        let Some(Open { name, kind, backward, cost, start }) = self.0.take() else { return };
        let duration_us = start.elapsed().as_secs_f64() * 1e6;
        let Ok(mut log) = log().lock() else { return };
        let start_us = start.saturating_duration_since(log.start).as_secs_f64() * 1e6;
        let thread = THREAD.with(|thread| *thread);
        log.events.push(Event { name, kind, backward, start_us, duration_us, thread, cost });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_noted_between_start_and_stop_only() {
        drop(op("before", Cost::default));
        start();
        {
            let _stage = stage(true, || "a stage".into());
            drop(op("trace-test", || Cost { flops: 2.0, bytes: 3.0 }));
        }
        // Other tests of this process may note theirs meanwhile.
        let events: Vec<Event> = stop()
            .into_iter()
            .filter(|e| e.name == "trace-test" || e.name == "a stage" || e.name == "before")
            .collect();
        drop(op("after", Cost::default));
        let names: Vec<&str> = events.iter().map(|e| e.name.as_ref()).collect();
        assert_eq!(names, ["trace-test", "a stage"]);
        assert_eq!((events[0].cost.flops, events[0].kind, events[1].backward), (2.0, Kind::Op, true));
        assert!(events[1].start_us <= events[0].start_us && events[1].duration_us >= events[0].duration_us);
        assert!(stop().is_empty());
    }
}
