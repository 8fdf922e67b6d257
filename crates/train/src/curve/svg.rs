//! The curve as a drawing.

use std::fmt::Write;

use super::{Curve, finite, smooth};

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

#[cfg(test)]
mod tests {
    use super::super::tests::{curve, falling};
    use super::*;

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
    fn envelope_keeps_extremes() {
        let mut points = falling(10_000);
        points[7_123].1 = 50.0;
        let drawn = envelope(&points, MAX_COLUMNS);
        assert!(drawn.len() <= 2 * MAX_COLUMNS && drawn.contains(&(7_124, 50.0)));
        assert!(drawn.windows(2).all(|w| w[0].0 <= w[1].0));
    }
}
