//! SVG as text. Everything that comes from a record passes through [`escaped`].

use std::fmt::Write as _;

use minijinja::HtmlEscape;

/// Text that can stand in markup, as content and in a quoted attribute. Control characters, which no document may hold,
/// become visible.
pub(super) fn escaped(text: &str) -> String {
    HtmlEscape(&printable(text)).to_string()
}

/// `text` without characters that are forbidden in documents.
pub(super) fn printable(text: &str) -> String {
    let is_forbidden = |c: char| {
        (c.is_control() && !matches!(c, '\n' | '\t'))
            || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    text.chars().map(|c| if is_forbidden(c) { '\u{fffd}' } else { c }).collect()
}

/// Where a text hangs on its point.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Anchor {
    Start,
    Middle,
    End,
}

/// Markup under construction.
#[derive(Default)]
pub(super) struct Svg(String);

impl Svg {
    /// Markup that is already safe.
    pub(super) fn raw(&mut self, markup: &str) {
        self.0.push_str(markup);
    }

    pub(super) fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let _ = write!(
            self.0,
            r#"<line class="{class}" x1="{:.1}" y1="{:.1}" x2="{:.1}" y2="{:.1}"/>"#,
            from.0, from.1, to.0, to.1
        );
    }

    pub(super) fn rect(&mut self, class: &str, from: (f64, f64), size: (f64, f64)) {
        let _ = write!(
            self.0,
            r#"<rect class="{class}" x="{:.1}" y="{:.1}" width="{:.1}" height="{:.1}"/>"#,
            from.0, from.1, size.0, size.1
        );
    }

    /// A line through all points.
    pub(super) fn path(&mut self, class: &str, points: &[(f64, f64)]) {
        if points.len() < 2 {
            return;
        }
        let _ = write!(self.0, r#"<path class="{class}" d="M"#);
        for (index, (x, y)) in points.iter().enumerate() {
            let _ = write!(self.0, "{}{x:.1} {y:.1}", if index > 0 { "L" } else { "" });
        }
        self.0.push_str(r#""/>"#);
    }

    pub(super) fn text(&mut self, class: &str, at: (f64, f64), anchor: Anchor, text: &str) {
        let anchor = match anchor {
            Anchor::Start => "start",
            Anchor::Middle => "middle",
            Anchor::End => "end",
        };
        let _ = write!(
            self.0,
            r#"<text class="{class}" x="{:.1}" y="{:.1}" text-anchor="{anchor}">{}</text>"#,
            at.0,
            at.1,
            escaped(text)
        );
    }

    /// A text that is read from below.
    pub(super) fn upright_text(&mut self, at: (f64, f64), text: &str) {
        let _ = write!(
            self.0,
            r#"<text transform="translate({:.1} {:.1}) rotate(-90)" text-anchor="middle">{}</text>"#,
            at.0,
            at.1,
            escaped(text)
        );
    }

    pub(super) fn finish(self) -> String {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_comes_from_a_record_cannot_become_markup() {
        assert_eq!(escaped("<script>'&\"\u{0}\u{202e}"), "&lt;script&gt;&#x27;&amp;&quot;\u{fffd}\u{fffd}");
        let mut svg = Svg::default();
        svg.text("x", (1.0, 2.0), Anchor::Middle, "</text><script>");
        assert_eq!(svg.finish().matches('<').count(), 2);
    }
}
