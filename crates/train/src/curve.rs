//! The loss curve: `curve.svg` for people and pages, and a small one in letters for the end of a run in a terminal.
//!
//! The drawing needs nothing but an SVG viewer, is the same to the byte for the same numbers, and has its own card
//! behind it that follows the reader's light or dark setting.

use std::fmt::Write;
use std::io;
use std::path::Path;

use crate::metrics::{Record, write_atomic};

/// What to draw. Points are `(step, value)`, steps rising; a value that is not finite is left out.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Curve {
    /// Line at the top.
    pub title: String,
    /// Mean training loss of each step, nats a token.
    pub train: Vec<(u64, f64)>,
    /// Validation loss, nats a token: drawn on the axis of the training loss.
    pub valid: Vec<(u64, f64)>,
    /// What a nat a token is in bits a byte: adds an axis of bits a byte on the right. `None` for no such axis.
    pub bits_per_byte_per_nat: Option<f64>,
}

impl Curve {
    /// The curve of a run's metrics. Steps that were skipped are left out.
    pub fn from_records(title: &str, records: &[Record]) -> Self {
        let mut curve = Self { title: title.into(), ..Self::default() };
        for record in records {
            match record {
                Record::Step(r) if !r.skipped => curve.train.push((r.step, r.loss)),
                Record::Step(_) => {}
                Record::Eval(r) => {
                    curve.valid.push((r.step, r.valid_loss));
                    curve.bits_per_byte_per_nat = Some(r.bits_per_byte / r.valid_loss);
                }
            }
        }
        curve
    }

    /// Writes [`curve_svg`] of it to `path`, whole or not at all.
    ///
    /// # Errors
    /// If the file system refuses; `path` is as it was.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        write_atomic(path, curve_svg(self).as_bytes())
    }
}

const WIDTH: f64 = 860.0;
const HEIGHT: f64 = 500.0;
const LEFT: f64 = 68.0;
const TOP: f64 = 64.0;
const BOTTOM: f64 = 440.0;
/// The most columns in which training losses are drawn: a run of a million steps makes no larger file.
const MAX_COLUMNS: usize = 700;

const STYLE: &str = "\
text{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',sans-serif;font-size:13px;fill:#57606a}\
.title{font-size:17px;font-weight:600;fill:#1f2328}.card{fill:#ffffff;stroke:#d0d7de}\
.grid{stroke:#eaeef2}.axis{stroke:#8c959f}.raw{stroke:#1f6feb;stroke-opacity:.22}.train{stroke:#1f6feb}\
.valid{stroke:#d1570c}.dot{fill:#d1570c;stroke:#ffffff}.label{font-weight:600;fill:#b34700;stroke:#ffffff;stroke-width:4;paint-order:stroke}\
polyline,line{fill:none}\
@media(prefers-color-scheme:dark){text{fill:#9198a1}.title{fill:#f0f6fc}.card{fill:#0d1117;stroke:#3d444d}\
.grid{stroke:#21262d}.axis{stroke:#656c76}.raw{stroke:#58a6ff;stroke-opacity:.28}.train{stroke:#58a6ff}\
.valid{stroke:#ffa657}.dot{fill:#ffa657;stroke:#0d1117}.label{fill:#ffa657;stroke:#0d1117}}";

/// Writes losses and validation losses (`(step, nats a token)`) as an SVG, whole or not at all; see [`Curve::write`].
///
/// # Errors
/// If the file system refuses; `path` is as it was.
pub fn write_curve_svg(path: &Path, train: &[(u64, f64)], valid: &[(u64, f64)], title: &str) -> io::Result<()> {
    let (train, valid) = (train.to_vec(), valid.to_vec());
    Curve { title: title.into(), train, valid, bits_per_byte_per_nat: None }.write(path)
}

/// `curve` as the text of an SVG, 860 by 500 pixels.
pub fn curve_svg(curve: &Curve) -> String {
    let (train, valid) = (finite(&curve.train), finite(&curve.valid));
    let scale = curve.bits_per_byte_per_nat.filter(|k| k.is_finite() && *k > 0.0);
    let frame = Frame::of(&train, &valid, if scale.is_some() { 62.0 } else { 24.0 });
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" width=\"{WIDTH}\" height=\"{HEIGHT}\" \
         role=\"img\">\n<title>{0}</title>\n<style>{STYLE}</style>\n\
         <rect class=\"card\" x=\".5\" y=\".5\" width=\"{1}\" height=\"{2}\" rx=\"10\"/>\n\
         <text class=\"title\" x=\"{LEFT}\" y=\"34\">{0}</text>\n",
        escape(&curve.title),
        WIDTH - 1.0,
        HEIGHT - 1.0,
    );
    frame.axes(&mut svg, scale);
    if train.is_empty() && valid.is_empty() {
        let _ = writeln!(svg, "<text x=\"430\" y=\"252\" text-anchor=\"middle\">no steps yet</text>");
    }
    let _ = writeln!(
        svg,
        "<clipPath id=\"plot\"><rect x=\"{LEFT}\" y=\"{TOP}\" width=\"{:.1}\" height=\"{}\"/></clipPath>",
        frame.right - LEFT,
        BOTTOM - TOP
    );
    frame.line(&mut svg, "raw", 1.0, &envelope(&train, MAX_COLUMNS));
    frame.line(&mut svg, "train", 2.2, &thin(&smooth(&train), MAX_COLUMNS));
    frame.line(&mut svg, "valid", 1.6, &valid);
    frame.markers(&mut svg, &valid, scale);
    legend(&mut svg, frame.right, !train.is_empty(), !valid.is_empty());
    svg.push_str("</svg>\n");
    svg
}

/// Where a step and a value lie in the drawing.
struct Frame {
    right: f64,
    steps: (f64, f64),
    values: (f64, f64),
}

impl Frame {
    /// Fits the smoothed losses and the validations, with some room; single outliers of raw losses are cut off.
    fn of(train: &[(u64, f64)], valid: &[(u64, f64)], margin: f64) -> Self {
        let all = || train.iter().chain(valid);
        let first = all().map(|p| p.0).min().unwrap_or(0) as f64;
        let last = all().map(|p| p.0).max().unwrap_or(1) as f64;
        // From 0 unless the curve is of a late piece of a run.
        let first = if first < 0.2 * last { 0.0 } else { first };
        let steps = (first, if last > first { last } else { first + (1e-6 * first).max(1.0) });
        let smoothed = smooth(train);
        let shown = || smoothed.iter().chain(valid).map(|p| p.1);
        let (mut low, mut high) = (shown().fold(f64::INFINITY, f64::min), shown().fold(f64::NEG_INFINITY, f64::max));
        if low > high {
            (low, high) = (0.0, 1.0);
        }
        let room = (0.06 * (high - low)).max(1e-9 + 0.01 * high.abs());
        let floor = if low >= 0.0 { (low - room).max(0.0) } else { low - room };
        Self { right: WIDTH - margin, steps, values: (floor, high + room) }
    }

    fn x(&self, step: f64) -> f64 {
        LEFT + (step - self.steps.0) / (self.steps.1 - self.steps.0) * (self.right - LEFT)
    }

    fn y(&self, value: f64) -> f64 {
        // Far outliers stay within what a renderer can draw; the clip path hides them.
        let y = BOTTOM - (value - self.values.0) / (self.values.1 - self.values.0) * (BOTTOM - TOP);
        y.clamp(-1e4, 1e4)
    }

    fn axes(&self, svg: &mut String, bits_per_nat: Option<f64>) {
        let right = self.right;
        for value in ticks(self.values.0, self.values.1, 7) {
            let y = self.y(value.at);
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{right:.1}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 9.0,
                y + 4.5,
                value.label
            );
        }
        for step in ticks(self.steps.0, self.steps.1, 8).iter().filter(|s| is_whole(s.at)) {
            let x = self.x(step.at);
            let label = step_label(step.at);
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{x:.1}\" y1=\"{TOP}\" x2=\"{x:.1}\" y2=\"{BOTTOM}\"/>\
                 <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{label}</text>",
                BOTTOM + 21.0
            );
        }
        if let Some(k) = bits_per_nat {
            for value in ticks(self.values.0 * k, self.values.1 * k, 7) {
                let y = self.y(value.at / k);
                let _ = writeln!(
                    svg,
                    "<line class=\"axis\" x1=\"{right:.1}\" y1=\"{y:.1}\" x2=\"{:.1}\" y2=\"{y:.1}\"/>\
                     <text x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                    right + 5.0,
                    right + 9.0,
                    y + 4.5,
                    value.label
                );
            }
            let _ = writeln!(
                svg,
                "<line class=\"axis\" x1=\"{right:.1}\" y1=\"{TOP}\" x2=\"{right:.1}\" y2=\"{BOTTOM}\"/>"
            );
            side_title(svg, WIDTH - 14.0, "bits per byte");
        }
        let _ = writeln!(
            svg,
            "<line class=\"axis\" x1=\"{LEFT}\" y1=\"{TOP}\" x2=\"{LEFT}\" y2=\"{BOTTOM}\"/>\
             <line class=\"axis\" x1=\"{LEFT}\" y1=\"{BOTTOM}\" x2=\"{right:.1}\" y2=\"{BOTTOM}\"/>\
             <text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">step</text>",
            0.5 * (LEFT + right),
            BOTTOM + 45.0
        );
        side_title(svg, 22.0, "loss, nats per token");
    }

    fn line(&self, svg: &mut String, class: &str, width: f64, points: &[(u64, f64)]) {
        if points.len() < 2 {
            return;
        }
        let _ = write!(
            svg,
            "<polyline class=\"{class}\" stroke-width=\"{width}\" stroke-linejoin=\"round\" clip-path=\"url(#plot)\" points=\""
        );
        for (step, value) in points {
            let _ = write!(svg, "{:.1},{:.1} ", self.x(*step as f64), self.y(*value));
        }
        svg.truncate(svg.trim_end().len());
        svg.push_str("\"/>\n");
    }

    /// A dot at each validation, fewer where they would touch, and the last value in words.
    fn markers(&self, svg: &mut String, valid: &[(u64, f64)], bits_per_nat: Option<f64>) {
        let Some((last, value)) = valid.last().copied() else { return };
        let mut free_from = f64::NEG_INFINITY;
        for (index, (step, value)) in valid.iter().enumerate() {
            let x = self.x(*step as f64);
            if x < free_from && index + 1 < valid.len() {
                continue;
            }
            free_from = x + 9.0;
            let _ = writeln!(svg, "<circle class=\"dot\" cx=\"{x:.1}\" cy=\"{:.1}\" r=\"4\"/>", self.y(*value));
        }
        let text = match bits_per_nat {
            Some(k) => format!("{value:.3} nats, {:.3} bits/byte", value * k),
            None => format!("{value:.3} nats"),
        };
        // Above the curve: that is where a falling loss leaves room.
        let (x, y) = (self.x(last as f64), (self.y(value) - 34.0).max(TOP + 14.0));
        let (x, anchor) = if x > 0.5 * (LEFT + self.right) { (x.min(self.right - 6.0), "end") } else { (x, "start") };
        let _ = writeln!(svg, "<text class=\"label\" x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{text}</text>");
    }
}

fn side_title(svg: &mut String, x: f64, text: &str) {
    let y = 0.5 * (TOP + BOTTOM);
    let _ = writeln!(
        svg,
        "<text x=\"{x}\" y=\"{y}\" text-anchor=\"middle\" transform=\"rotate(-90 {x} {y})\">{text}</text>"
    );
}

fn legend(svg: &mut String, right: f64, train: bool, valid: bool) {
    let mut x = right;
    if valid {
        x -= 82.0;
        let _ = writeln!(
            svg,
            "<line class=\"valid\" stroke-width=\"1.6\" x1=\"{x:.1}\" y1=\"47\" x2=\"{:.1}\" y2=\"47\"/>\
             <circle class=\"dot\" cx=\"{:.1}\" cy=\"47\" r=\"4\"/><text x=\"{:.1}\" y=\"51.5\">validation</text>",
            x + 20.0,
            x + 10.0,
            x + 26.0
        );
    }
    if train {
        x -= 138.0;
        let _ = writeln!(
            svg,
            "<line class=\"raw\" stroke-width=\"7\" x1=\"{x:.1}\" y1=\"47\" x2=\"{0:.1}\" y2=\"47\"/>\
             <line class=\"train\" stroke-width=\"2.2\" x1=\"{x:.1}\" y1=\"47\" x2=\"{0:.1}\" y2=\"47\"/>\
             <text x=\"{1:.1}\" y=\"51.5\">train, smoothed</text>",
            x + 20.0,
            x + 26.0
        );
    }
}

fn escape(text: &str) -> String {
    text.chars().fold(String::new(), |mut out, c| {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            c if c.is_control() => out.push(' '),
            c => out.push(c),
        }
        out
    })
}

/// A place on an axis.
struct Tick {
    at: f64,
    label: String,
}

/// At most `most` round places (1, 2, 2.5 or 5 times a power of ten apart) from `low` to `high`.
fn ticks(low: f64, high: f64, most: usize) -> Vec<Tick> {
    let span = high - low;
    if !(span > 0.0 && span.is_finite()) {
        return Vec::new();
    }
    let unit = 10f64.powf((span / most as f64).log10().floor());
    let step = [1.0, 2.0, 2.5, 5.0, 10.0].map(|m| m * unit).into_iter().find(|s| span / s <= most as f64);
    let step = step.unwrap_or(10.0 * unit);
    let digits = (0..12).find(|d| is_whole(step * 10f64.powi(*d))).unwrap_or(12) as usize;
    let (from, to) = ((low / step - 1e-9).ceil(), (high / step + 1e-9).floor());
    // `+ 0.0` makes a negative zero positive.
    (0..=(to - from).max(0.0) as usize)
        .map(|i| (from + i as f64) * step + 0.0)
        .map(|at| Tick { at, label: format!("{at:.digits$}") })
        .collect()
}

fn is_whole(x: f64) -> bool {
    (x - x.round()).abs() < 1e-6 * x.abs().max(1.0)
}

/// `800`, `1,200`, `25k`, `1.5M`.
fn step_label(step: f64) -> String {
    let text = |value: f64, unit: &str| format!("{}{unit}", (value * 100.0).round() / 100.0);
    match step {
        s if s >= 1e6 => text(s / 1e6, "M"),
        s if s >= 1e4 => text(s / 1e3, "k"),
        s if s >= 1e3 => format!("{},{:03}", (s / 1e3).floor(), s % 1e3),
        s => text(s, ""),
    }
}

fn finite(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    points.iter().copied().filter(|p| p.1.is_finite()).collect()
}

/// A centred moving mean over 3% of the points. At the start it reaches no further ahead than behind, so that the first
/// fall stays steep; at the end it looks behind only.
fn smooth(points: &[(u64, f64)]) -> Vec<(u64, f64)> {
    let mut sums = vec![0.0];
    for (_, value) in points {
        sums.push(sums[sums.len() - 1] + value);
    }
    let radius = (points.len() * 3 / 200).min(500);
    let mean = |i: usize| {
        let behind = radius.min(i);
        let ahead = behind.min(points.len() - 1 - i);
        (sums[i + ahead + 1] - sums[i - behind]) / (ahead + behind + 1) as f64
    };
    points.iter().enumerate().map(|(i, p)| (p.0, mean(i))).collect()
}

/// At most `most` of the points, the last among them.
fn thin(points: &[(u64, f64)], most: usize) -> Vec<(u64, f64)> {
    let stride = points.len().div_ceil(most.max(1)).max(1);
    let mut kept: Vec<_> = points.iter().copied().step_by(stride).collect();
    if kept.last() != points.last() {
        kept.extend(points.last());
    }
    kept
}

/// The lowest and highest of each of at most `most` runs of points.
fn envelope(points: &[(u64, f64)], most: usize) -> Vec<(u64, f64)> {
    let length = points.len().div_ceil(most.max(1));
    if length <= 2 {
        return points.to_vec();
    }
    let by_value = |a: &&(u64, f64), b: &&(u64, f64)| a.1.total_cmp(&b.1);
    let ends = points.chunks(length).filter_map(|chunk| {
        let (low, high) = (*chunk.iter().min_by(by_value)?, *chunk.iter().max_by(by_value)?);
        Some(if low.0 <= high.0 { [low, high] } else { [high, low] })
    });
    ends.flatten().collect()
}

/// The means of `width` runs of `values`, as one line of blocks: `█▆▄▃▂▂▁▁`.
pub fn sparkline(values: &[f64], width: usize) -> String {
    const BLOCKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    let values: Vec<f64> = values.iter().copied().filter(|x| x.is_finite()).collect();
    let columns: Vec<f64> = columns(&values, width);
    let (low, high) = bounds(&columns);
    let span = (high - low).max(f64::MIN_POSITIVE);
    columns.iter().map(|x| BLOCKS[((x - low) / span * 7.0).round() as usize]).collect()
}

fn columns(values: &[f64], width: usize) -> Vec<f64> {
    let width = width.clamp(1, 1000).min(values.len());
    let edge = |i: usize| i * values.len() / width.max(1);
    (0..width).map(|i| &values[edge(i)..edge(i + 1)]).map(|run| run.iter().sum::<f64>() / run.len() as f64).collect()
}

fn bounds(values: &[f64]) -> (f64, f64) {
    (values.iter().copied().fold(f64::INFINITY, f64::min), values.iter().copied().fold(f64::NEG_INFINITY, f64::max))
}

/// The smoothed training losses as a drawing of `width` by `height` letters: braille dots, an axis of losses on the left
/// and one of steps below. Empty where there are fewer than two points or no room.
///
/// ```text
/// 9.1 ┤⢇
///     │⠈⢆
///     │ ⠈⠢⣀
/// 4.2 ┤   ⠉⠑⠒⠤⠤⠤⣀⣀⣀
///     └────────────
///      0        600
/// ```
pub fn ascii_curve(points: &[(u64, f64)], width: usize, height: usize) -> String {
    let points = smooth(&finite(points));
    let (Some(first), Some(last)) = (points.first(), points.last()) else { return String::new() };
    let values: Vec<f64> = points.iter().map(|p| p.1).collect();
    let (low, high) = bounds(&values);
    let (top, bottom) = (format!("{high:.2}"), format!("{low:.2}"));
    let margin = top.len().max(bottom.len());
    let (columns, rows) = (width.min(400).saturating_sub(margin + 2), height.min(200).saturating_sub(2));
    if points.len() < 2 || last.0 <= first.0 || columns < 8 || rows < 2 {
        return String::new();
    }
    let cells = braille(&points, (low, high), columns, rows);
    let mut out = String::new();
    for (row, line) in cells.chunks(columns).enumerate() {
        let (label, edge) = match row {
            0 => (top.as_str(), '┤'),
            r if r + 1 == rows => (bottom.as_str(), '┤'),
            _ => ("", '│'),
        };
        let dots: String = line.iter().filter_map(|bits| char::from_u32(0x2800 + u32::from(*bits))).collect();
        let _ = writeln!(out, "{label:>margin$} {edge}{}", dots.trim_end_matches('\u{2800}'));
    }
    let (from, to) = (first.0.to_string(), last.0.to_string());
    let _ = writeln!(out, "{:margin$} └{}", "", "─".repeat(columns));
    let _ = writeln!(out, "{:margin$}  {from}{to:>1$}", "", columns.saturating_sub(from.len()));
    out
}

/// The dots of each letter, row by row: a letter is 2 dots wide and 4 high, lines are joined.
fn braille(points: &[(u64, f64)], (low, high): (f64, f64), columns: usize, rows: usize) -> Vec<u8> {
    /// Bit of each dot, `[x][y]`.
    const DOTS: [[u8; 4]; 2] = [[0x01, 0x02, 0x04, 0x40], [0x08, 0x10, 0x20, 0x80]];
    let (wide, tall) = (2 * columns, 4 * rows);
    let (start, end) = (points[0].0 as f64, points[points.len() - 1].0 as f64);
    let span = (high - low).max(f64::MIN_POSITIVE);
    let mut cells = vec![0u8; columns * rows];
    let mut previous: Option<usize> = None;
    let mut next = 0;
    for x in 0..wide {
        let step = start + (end - start) * x as f64 / (wide - 1) as f64;
        while next + 2 < points.len() && points[next + 1].0 as f64 <= step {
            next += 1;
        }
        let ((s0, v0), (s1, v1)) = (points[next], points[(next + 1).min(points.len() - 1)]);
        let part = ((step - s0 as f64) / ((s1.saturating_sub(s0)).max(1) as f64)).clamp(0.0, 1.0);
        let value = v0 + (v1 - v0) * part;
        let y = ((high - value) / span * (tall - 1) as f64).round() as usize;
        let from = previous.map_or(y, |p| {
            if p < y {
                p + 1
            } else if p > y {
                p - 1
            } else {
                y
            }
        });
        for dot in from.min(y)..=from.max(y) {
            cells[dot / 4 * columns + x / 2] |= DOTS[x % 2][dot % 4];
        }
        previous = Some(y);
    }
    cells
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::EvalRecord;

    /// A loss that falls from about 9 to about 3.3, with a fixed ripple.
    fn falling(count: u64) -> Vec<(u64, f64)> {
        let ripple = |s: u64| ((s.wrapping_mul(2_654_435_761) >> 7) % 1000) as f64 / 1000.0 - 0.5;
        let loss = |s: u64| 3.3 + 5.7 * (-(s as f64) * 12.0 / count as f64).exp() + 0.3 * ripple(s);
        (1..=count).map(|s| (s, loss(s))).collect()
    }

    fn curve(count: u64) -> Curve {
        let valid = falling(count).into_iter().filter(|p| p.0 % (count / 10) == 0).map(|(s, v)| (s, v + 0.1)).collect();
        Curve {
            title: "quickstart: 5.1M parameters".into(),
            train: falling(count),
            valid,
            bits_per_byte_per_nat: Some(0.44),
        }
    }

    /// Every coordinate of every line lies within the picture, and the tags are balanced.
    fn check(svg: &str) {
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"), "{svg}");
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        for points in svg.split("points=\"").skip(1).filter_map(|s| s.split('"').next()) {
            for pair in points.split(' ') {
                let (x, y) = pair.split_once(',').unwrap();
                let (x, y): (f64, f64) = (x.parse().unwrap(), y.parse().unwrap());
                assert!((LEFT..=WIDTH).contains(&x) && y.is_finite(), "{pair}");
            }
        }
    }

    #[test]
    fn a_curve_has_axes_lines_markers_and_the_last_value() {
        let svg = curve_svg(&curve(600));
        check(&svg);
        let last = curve(600).valid[9].1;
        assert!(svg.contains(&format!("{last:.3} nats, {:.3} bits/byte", last * 0.44)), "{svg}");
        assert_eq!(svg.matches("<circle").count(), 11, "ten validations and the legend");
        assert!(svg.contains(">600</text>") && svg.contains(">bits per byte</text>"));
        assert_eq!(svg, curve_svg(&curve(600)), "the same numbers give the same bytes");
    }

    #[test]
    fn degenerate_curves_are_drawn_too() {
        for train in [
            vec![],
            vec![(1, 4.0)],
            vec![(1, 4.0), (2, 4.0)],
            vec![(5, f64::NAN), (6, f64::INFINITY)],
            vec![(1, 0.0), (2, 0.0), (3, 1e30)],
            vec![(u64::MAX - 1, -3.0), (u64::MAX, -4.0)],
        ] {
            let svg = curve_svg(&Curve { title: "a < b & \"c\"".into(), train: train.clone(), ..Curve::default() });
            check(&svg);
            assert!(svg.contains("a &lt; b &amp; &quot;c&quot;"), "{train:?}");
            ascii_curve(&train, 60, 12);
        }
    }

    #[test]
    fn a_long_run_makes_no_large_file() {
        let svg = curve_svg(&curve(100_000));
        check(&svg);
        assert!(svg.len() < 100_000, "{} bytes", svg.len());
    }

    #[test]
    fn ticks_are_round_and_few() {
        let labels = |low, high| ticks(low, high, 7).into_iter().map(|t| t.label).collect::<Vec<_>>();
        assert_eq!(labels(3.1, 9.4), ["4", "5", "6", "7", "8", "9"]);
        assert_eq!(labels(0.0, 0.3), ["0.00", "0.05", "0.10", "0.15", "0.20", "0.25", "0.30"]);
        assert_eq!(labels(-1.0, 1.0), ["-1.0", "-0.5", "0.0", "0.5", "1.0"]);
        assert!(labels(2.0, 2.0).is_empty() && labels(0.0, f64::NAN).is_empty());
        for span in [1e-6, 0.37, 8.2, 12345.0, 1e12] {
            let count = ticks(0.11 * span, 1.11 * span, 7).len();
            assert!((2..=8).contains(&count), "{count} ticks over {span}");
        }
        for (step, label) in [(0.0, "0"), (800.0, "800"), (1_200.0, "1,200"), (25_000.0, "25k"), (1.5e6, "1.5M")] {
            assert_eq!(step_label(step), label);
        }
    }

    #[test]
    fn smoothing_keeps_ends_and_lowers_noise() {
        let points = falling(1000);
        let smoothed = smooth(&points);
        assert_eq!(smoothed[0], points[0], "the first loss is what it was");
        let rough = |p: &[(u64, f64)]| p[500..].windows(2).map(|w| (w[1].1 - w[0].1).abs()).sum::<f64>();
        assert!(rough(&smoothed) < 0.1 * rough(&points));
        assert_eq!(smooth(&[(1, 2.0), (2, 3.0)]), [(1, 2.0), (2, 3.0)]);
    }

    #[test]
    fn envelope_keeps_extremes() {
        let mut points = falling(10_000);
        points[7_123].1 = 50.0;
        let drawn = envelope(&points, MAX_COLUMNS);
        assert!(drawn.len() <= 2 * MAX_COLUMNS && drawn.contains(&(7_124, 50.0)));
        assert!(drawn.windows(2).all(|w| w[0].0 <= w[1].0));
    }

    #[test]
    fn records_become_a_curve() {
        let eval = EvalRecord { step: 10, valid_loss: 2.0, bits_per_byte: 0.8, perplexity: 7.4, tokens: 5 };
        let curve = Curve::from_records("t", &[Record::Eval(eval)]);
        assert_eq!((curve.valid.as_slice(), curve.bits_per_byte_per_nat), ([(10, 2.0)].as_slice(), Some(0.4)));
    }

    #[test]
    fn letters() {
        assert_eq!(sparkline(&[8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8), "█▇▆▅▄▃▂▁");
        assert_eq!(sparkline(&[1.0, f64::NAN, 1.0], 8), "▁▁");
        assert_eq!(sparkline(&[], 8), "");
        let drawn = ascii_curve(&falling(600), 60, 10);
        let lines: Vec<&str> = drawn.lines().collect();
        assert_eq!(lines.len(), 10);
        assert!(lines.iter().all(|l| l.chars().count() <= 60), "{drawn}");
        assert!(lines[0].contains(" ┤") && lines[9].ends_with("600"), "{drawn}");
        assert_eq!(ascii_curve(&falling(600), 5, 3), "");
    }

    #[test]
    fn a_curve_is_written_whole_or_not_at_all() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("curve.svg");
        curve(100).write(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), curve_svg(&curve(100)));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_curve_svg(&dir.path().join("no/curve.svg"), &falling(10), &[], "t").is_err());
    }
}
