//! A profile of training steps: what each op took, beside the least that it could have taken.

use std::cmp::Ordering;
use std::collections::HashMap;

use serde::Serialize;
use serde_json::{Value, json};
use tallow_ops::trace::{Event, Kind};

/// What a machine can do at best, measured.
#[derive(Clone, Copy, Debug)]
pub struct Peaks {
    /// FLOP/s in the dtype of the products.
    pub flops: f64,
    /// Bytes/s between memory and the cores.
    pub bandwidth: f64,
}

/// The spans of some steps.
#[derive(Clone, Debug)]
pub struct Profile {
    /// All spans, in the order in which they ended.
    pub events: Vec<Event>,
    /// Steps that they are of.
    pub steps: usize,
    /// Seconds of those steps together.
    pub seconds: f64,
}

/// One line of a profile: an op in one direction, a step's share of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// The op; `everything else` for what is between the ops (tape, allocation, hand-over).
    pub op: String,
    /// Whether it ran backward.
    pub backward: bool,
    /// Calls a step.
    pub calls: f64,
    /// Milliseconds a step.
    pub ms: f64,
    /// Part of the step, 0 to 1.
    pub share: f64,
    /// Milliseconds a step that arithmetic or memory traffic takes at the machine's peaks, the larger of the two.
    pub floor_ms: f64,
    /// Which of the two: `flops` or `bytes`.
    pub bound: &'static str,
}

impl Profile {
    /// The ops, the longest first, and last what is between them.
    pub fn rows(&self, peaks: Peaks) -> Vec<Row> {
        let steps = self.steps.max(1) as f64;
        let mut sums: HashMap<(&str, bool), (f64, f64, f64, f64)> = HashMap::new();
        for (event, self_us) in self_times(&self.events) {
            let sum = sums.entry((&event.name, event.backward)).or_default();
            sum.0 += 1.0;
            sum.1 += self_us / 1e3;
            sum.2 += event.cost.flops / peaks.flops * 1e3;
            sum.3 += event.cost.bytes / peaks.bandwidth * 1e3;
        }
        let step_ms = self.seconds * 1e3 / steps;
        let mut rows: Vec<Row> = sums
            .into_iter()
            .map(|((op, backward), (calls, ms, arithmetic, traffic))| Row {
                op: op.into(),
                backward,
                calls: calls / steps,
                ms: ms / steps,
                share: ms / steps / step_ms,
                floor_ms: arithmetic.max(traffic) / steps,
                bound: if arithmetic > traffic { "flops" } else { "bytes" },
            })
            .collect();
        rows.sort_by(|a, b| b.ms.total_cmp(&a.ms).then_with(|| (&a.op, a.backward).cmp(&(&b.op, b.backward))));
        let rest = step_ms - rows.iter().map(|row| row.ms).sum::<f64>();
        rows.push(Row {
            op: "everything else".into(),
            backward: false,
            calls: 1.0,
            ms: rest,
            share: rest / step_ms,
            floor_ms: 0.0,
            bound: "bytes",
        });
        rows
    }

    /// The table of [`rows`](Self::rows) for people.
    pub fn table(&self, peaks: Peaks) -> String {
        let mut text = format!(
            "{:28} {:>7} {:>10} {:>7} {:>10} {:>7}\n",
            "op", "calls", "ms a step", "share", "floor ms", "floor"
        );
        for row in self.rows(peaks) {
            let name = format!("{}{}", row.op, if row.backward { " backward" } else { "" });
            let of_floor = match row.floor_ms {
                0.0 => "-".into(),
                floor => format!("{:.0}%", 100.0 * floor / row.ms),
            };
            text += &format!(
                "{name:28} {:>7.0} {:>10.2} {:>6.1}% {:>10.2} {of_floor:>7}\n",
                row.calls,
                row.ms,
                100.0 * row.share,
                row.floor_ms,
            );
        }
        text
    }

    /// The spans as a Chrome trace (`chrome://tracing`, Perfetto): complete events, microseconds.
    pub fn chrome_trace(&self) -> Value {
        let events = self.events.iter().map(|e| {
            json!({
                "name": if e.backward { format!("{} backward", e.name) } else { e.name.to_string() },
                "cat": match e.kind { Kind::Op => "op", Kind::Stage => "stage" },
                "ph": "X",
                "ts": e.start_us,
                "dur": e.duration_us,
                "pid": 0,
                "tid": e.thread,
                "args": { "flops": e.cost.flops, "bytes": e.cost.bytes },
            })
        });
        json!({ "traceEvents": events.collect::<Vec<_>>(), "displayTimeUnit": "ms" })
    }
}

/// Each op with its microseconds less those of the ops within it.
fn self_times(events: &[Event]) -> Vec<(&Event, f64)> {
    let mut ops: Vec<(&Event, f64)> =
        events.iter().filter(|e| e.kind == Kind::Op).map(|e| (e, e.duration_us)).collect();
    ops.sort_by(|(a, _), (b, _)| {
        (a.thread, a.start_us).partial_cmp(&(b.thread, b.start_us)).unwrap_or(Ordering::Equal)
    });
    let mut open: Vec<usize> = vec![];
    for i in 0..ops.len() {
        let (event, _) = ops[i];
        while let Some(&outer) = open.last() {
            let (outer, _) = ops[outer];
            if outer.thread == event.thread && event.start_us < outer.start_us + outer.duration_us {
                break;
            }
            open.pop();
        }
        if let Some(&outer) = open.last() {
            ops[outer].1 -= event.duration_us;
        }
        open.push(i);
    }
    ops
}

#[cfg(test)]
mod tests {
    use super::*;
    use tallow_ops::trace::Cost;

    fn event(name: &'static str, kind: Kind, start_us: f64, duration_us: f64, (flops, bytes): (f64, f64)) -> Event {
        let (backward, thread) = (false, 0);
        Event { name: name.into(), kind, backward, start_us, duration_us, thread, cost: Cost { flops, bytes } }
    }

    #[test]
    fn rows_add_up_to_the_step_and_know_their_floor() {
        let events = vec![
            event("linear", Kind::Op, 0.0, 600.0, (4e5, 1e3)),
            // Within the second product.
            event("rope", Kind::Op, 800.0, 200.0, (0.0, 1e5)),
            event("linear", Kind::Op, 700.0, 800.0, (4e5, 1e3)),
            event("block 0", Kind::Stage, 0.0, 1500.0, (0.0, 0.0)),
        ];
        let profile = Profile { events, steps: 2, seconds: 2e-3 };
        let rows = profile.rows(Peaks { flops: 1e9, bandwidth: 1e9 });
        assert_eq!(rows.iter().map(|r| r.op.as_str()).collect::<Vec<_>>(), ["linear", "rope", "everything else"]);
        assert!((rows.iter().map(|r| r.share).sum::<f64>() - 1.0).abs() < 1e-12);
        assert!((rows[0].ms - 0.6).abs() < 1e-12 && (rows[0].floor_ms - 0.4).abs() < 1e-12);
        assert_eq!((rows[0].bound, rows[1].bound, rows[0].calls), ("flops", "bytes", 1.0));
        assert!((rows[2].ms - 0.3).abs() < 1e-12);
        let trace = profile.chrome_trace();
        assert_eq!(trace["traceEvents"].as_array().map(Vec::len), Some(4));
        assert_eq!(trace["traceEvents"][3]["cat"], "stage");
        assert!(profile.table(Peaks { flops: 1e9, bandwidth: 1e9 }).lines().count() == 4);
    }
}
