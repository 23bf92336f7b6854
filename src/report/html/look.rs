//! What tells lines apart: colour, marker and dash, so that none of the three is needed alone. The colours are those of
//! Okabe and Ito, which people with any kind of colour blindness can tell apart; the style sheet holds them.

use std::fmt::Write as _;

/// Colours in the style sheet.
const COLOURS: usize = 7;
/// Coprime to the colours, so that the pairs come round only after 56.
const MARKERS: usize = 8;
/// Kinds of lines.
pub(super) const DASHES: usize = 5;
/// Half the size of a marker, in units of the chart.
const HALF: f64 = 4.0;

/// How one line is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Look {
    shape: usize,
    dash: usize,
}

impl Look {
    /// Colour and marker by `shape`, the dash by `dash`; both come round.
    pub(super) fn new(shape: usize, dash: usize) -> Look {
        Look { shape, dash: dash % DASHES }
    }

    /// The class that colours whatever is inside.
    pub(super) fn colour_class(self) -> String {
        format!("c{}", self.shape % COLOURS)
    }

    pub(super) fn line_class(self) -> String {
        format!("line d{}", self.dash)
    }

    /// The marker around a point; filled or not, so that twice as many differ.
    pub(super) fn marker(self, (x, y): (f64, f64)) -> String {
        let mut markup = String::new();
        let polygon = |corners: &[(f64, f64)]| {
            let mut points = String::new();
            for (dx, dy) in corners {
                let _ = write!(points, "{:.1},{:.1} ", x + dx * HALF, y + dy * HALF);
            }
            format!(r#"<polygon points="{}"/>"#, points.trim_end())
        };
        let shape = match self.shape % MARKERS {
            0 => format!(r#"<circle cx="{x:.1}" cy="{y:.1}" r="{HALF}"/>"#),
            1 => polygon(&[(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)]),
            2 => polygon(&[(0.0, -1.2), (1.1, 0.8), (-1.1, 0.8)]),
            3 => polygon(&[(0.0, -1.3), (1.3, 0.0), (0.0, 1.3), (-1.3, 0.0)]),
            4 => polygon(&[(0.0, 1.2), (1.1, -0.8), (-1.1, -0.8)]),
            5 => polygon(&[(-1.2, 0.0), (0.8, -1.1), (0.8, 1.1)]),
            6 => polygon(&[(1.2, 0.0), (-0.8, -1.1), (-0.8, 1.1)]),
            _ => polygon(&[(0.0, -1.2), (1.1, -0.4), (0.7, 1.0), (-0.7, 1.0), (-1.1, -0.4)]),
        };
        let _ = write!(markup, r#"<g class="marker">{shape}</g>"#);
        markup
    }

    /// A small picture of the line for a legend; the text beside it says the rest.
    pub(super) fn swatch(self) -> String {
        format!(
            r#"<svg class="swatch {}" viewBox="0 0 30 14" width="30" height="14" aria-hidden="true"><path class="{}" d="M1 7L29 7"/>{}</svg>"#,
            self.colour_class(),
            self.line_class(),
            self.marker((15.0, 7.0))
        )
    }
}

/// A line without a record's colour and marker.
pub(super) fn dash_swatch(dash: usize) -> String {
    let class = Look::new(0, dash).line_class();
    format!(
        r#"<svg class="swatch c6" viewBox="0 0 30 14" width="30" height="14" aria-hidden="true"><path class="{class}" d="M1 7L29 7"/></svg>"#
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fifty_six_records_all_look_different() {
        let looks: std::collections::BTreeSet<String> =
            (0..COLOURS * MARKERS).map(|shape| Look::new(shape, 0).swatch()).collect();
        assert_eq!(looks.len(), 56);
    }
}
