//! The curve in letters.

use std::fmt::Write;

use super::{finite, smooth};

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
    use super::super::tests::falling;
    use super::*;

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
    fn degenerate_curves_are_no_panic() {
        let curves =
            [vec![], vec![(1, 4.0)], vec![(1, 4.0), (2, 4.0)], vec![(5, f64::NAN), (6, 2.0)], vec![(7, 1.0), (7, 2.0)]];
        for points in curves.into_iter().chain([vec![(u64::MAX - 1, -3.0), (u64::MAX, 1e300)]]) {
            let drawn = ascii_curve(&points, 60, 12);
            assert!(drawn.is_empty() || drawn.lines().count() == 12, "{drawn}");
        }
    }
}
