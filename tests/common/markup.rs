//! A small reader of markup for tests: enough of HTML and SVG to say whether tags nest, and to find elements.

#![allow(dead_code, unreachable_pub)] // each test crate uses its own part

use std::collections::{BTreeMap, BTreeSet};

/// Elements that have no end.
const VOID: [&str; 4] = ["meta", "link", "br", "img"];

/// One element with its attributes and all text inside, entities resolved.
#[derive(Clone, Debug, Default)]
pub struct Element {
    pub name: String,
    pub attributes: BTreeMap<String, String>,
    pub text: String,
    /// Names of the elements around it, the outermost first.
    pub within: Vec<String>,
}

impl Element {
    pub fn attribute(&self, name: &str) -> &str {
        self.attributes.get(name).map_or("", String::as_str)
    }
}

/// All elements in the order in which they end.
///
/// # Panics
/// When a tag does not end where it should, an attribute is not quoted or stands twice, or a `<` or `&` is bare.
pub fn elements(document: &str) -> Vec<Element> {
    let mut rest = document.strip_prefix("<!doctype html>").expect("a doctype");
    let (mut open, mut done): (Vec<Element>, Vec<Element>) = (Vec::new(), Vec::new());
    while let Some(at) = rest.find('<') {
        let text = if is_raw(&open) { rest[..at].to_owned() } else { resolved(&rest[..at]) };
        open.iter_mut().for_each(|element| element.text.push_str(&text));
        let end = tag_end(&rest[at..]);
        let tag = &rest[at + 1..at + end];
        rest = &rest[at + end + 1..];
        if let Some(name) = tag.strip_prefix('/') {
            let element = open.pop().unwrap_or_else(|| panic!("</{name}> ends nothing"));
            assert_eq!(element.name, name, "</{name}> ends <{}>: {element:?}", element.name);
            done.push(element);
            continue;
        }
        let (tag, is_closed) = tag.strip_suffix('/').map_or((tag, false), |tag| (tag, true));
        let mut element = parse_tag(tag);
        element.within = open.iter().map(|outer| outer.name.clone()).collect();
        if is_closed || VOID.contains(&element.name.as_str()) {
            done.push(element);
        } else {
            open.push(element);
        }
    }
    assert!(open.is_empty(), "not ended: {:?}", open.iter().map(|element| &element.name).collect::<Vec<_>>());
    done
}

fn is_raw(open: &[Element]) -> bool {
    open.last().is_some_and(|element| ["style", "script"].contains(&element.name.as_str()))
}

/// Where the `>` of a tag is; one in quotes ends nothing.
fn tag_end(text: &str) -> usize {
    let mut is_quoted = false;
    for (at, letter) in text.char_indices() {
        match letter {
            '"' => is_quoted = !is_quoted,
            '>' if !is_quoted => return at,
            _ => {}
        }
    }
    panic!("a tag does not end: {}", &text[..text.len().min(60)]);
}

fn parse_tag(tag: &str) -> Element {
    let (name, mut rest) = tag.split_once(' ').unwrap_or((tag, ""));
    assert!(!name.is_empty() && name.chars().all(|c| c.is_ascii_alphanumeric()), "<{tag}> has no name");
    let mut element = Element { name: name.to_owned(), ..Element::default() };
    while let Some((attribute, after)) = rest.trim_start().split_once("=\"") {
        let (value, after) = after.split_once('"').expect("a quoted attribute");
        assert!(attribute.chars().all(|c| c.is_ascii_alphanumeric() || c == '-'), "<{tag}>: {attribute}");
        let before = element.attributes.insert(attribute.to_owned(), resolved(value));
        assert!(before.is_none(), "<{tag}> has {attribute} twice");
        rest = after;
    }
    assert!(rest.trim().is_empty(), "<{tag}> ends with {rest}");
    element
}

fn resolved(text: &str) -> String {
    let entities =
        [("lt", '<'), ("gt", '>'), ("amp", '&'), ("quot", '"'), ("#x27", '\''), ("#x2f", '/'), ("#39", '\'')];
    let mut parts = text.split('&');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (entity, after) = part.split_once(';').unwrap_or_else(|| panic!("a bare & before {part}"));
        let (_, letter) = entities
            .iter()
            .find(|(name, _)| *name == entity)
            .unwrap_or_else(|| panic!("&{entity}; is foreign"));
        out.push(*letter);
        out.push_str(after);
    }
    out
}

/// The elements of a name.
pub fn named<'a>(all: &'a [Element], name: &'a str) -> impl Iterator<Item = &'a Element> {
    all.iter().filter(move |element| element.name == name)
}

/// All elements of a page that nests, refers to nothing outside, names nothing twice and describes its charts.
///
/// # Panics
/// When it does not.
pub fn assert_sound(text: &str) -> Vec<Element> {
    let all = elements(text);
    let ids: Vec<&str> =
        all.iter().map(|element| element.attribute("id")).filter(|id| !id.is_empty()).collect();
    let unique: BTreeSet<&str> = ids.iter().copied().collect();
    assert_eq!(ids.len(), unique.len(), "an id stands twice in {ids:?}");
    for element in &all {
        for (attribute, value) in &element.attributes {
            assert!(
                !attribute.starts_with("on") && attribute != "src" && attribute != "style",
                "{element:?}"
            );
            if attribute == "href" {
                let is_inside = value.strip_prefix('#').is_some_and(|id| unique.contains(id));
                assert!(is_inside || value == "data:,", "{element:?}");
            }
            if attribute == "aria-labelledby" {
                assert!(value.split(' ').all(|id| unique.contains(id)), "{element:?}");
            }
        }
    }
    for tag in ["script", "iframe", "object", "img", "use", "image", "form", "base"] {
        assert_eq!(named(&all, tag).count(), 0, "<{tag}>");
    }
    let style = named(&all, "style").next().unwrap();
    assert!(!style.text.contains("url(") && !style.text.contains("@import"), "{}", style.text);
    for chart in charts(&all) {
        let id = chart.attribute("id");
        for part in ["title", "desc"] {
            let wanted = format!("{id}-{part}");
            let found = named(&all, part).find(|element| element.attribute("id") == wanted);
            assert!(found.is_some_and(|found| !found.text.is_empty()), "{id} has no {part}");
        }
    }
    all
}

/// The charts of a page.
pub fn charts(all: &[Element]) -> impl Iterator<Item = &Element> {
    named(all, "svg").filter(|svg| svg.attribute("class") == "chart")
}
