//! The page and the document of a plan: their markup, their numbers against the plan, and what hostile sites make of them.

#![allow(clippy::unwrap_used)]

#[path = "common/markup.rs"]
mod markup;
#[path = "common/planted.rs"]
mod planted;
#[path = "common/program.rs"]
mod program;

use std::path::{Path, PathBuf};

use markup::{Element, assert_sound, charts, named};
use planted::{LINEAR, decode_grid, prefill_grid, record};
use program::tokmeter;
use tokmeter::analysis::calibrate::{Calibration, calibrate, read_calibration};
use tokmeter::analysis::plan::{Plan, PlanOptions, Site, parse_site, plan, read_site};
use tokmeter::record::{Amount, Maybe};
use tokmeter::report::{plan_markdown, plan_page};
use tokmeter::units::format_significant;

const OPTIONS: PlanOptions = PlanOptions { draws: 200, seed: 0, allow_extrapolation: false };

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// A shipped site under the calibration that it names.
fn shipped(name: &str) -> (Plan, Site) {
    let site = read_site(&repository(&format!("sites/{name}.toml")), &[]).unwrap();
    let calibration = read_calibration(&repository(site.calibration.as_ref().unwrap())).unwrap();
    (plan(&site, &calibration, &OPTIONS).unwrap(), site)
}

/// Laws of time and energy, and a site whose every boundary and price is known.
fn measured() -> (Plan, Site) {
    let cells = [decode_grid(), prefill_grid()].concat();
    let calibration: Calibration = calibrate(&[record(&LINEAR, &cells)], Vec::new()).unwrap();
    let text = std::fs::read_to_string(repository("sites/nvl72-gb200.toml")).unwrap();
    let figure =
        |key: &str, value: &str| format!("[{key}]\nvalue = {value}\nsource = 's'\nconfidence = 'assumed'\n");
    let mut text = text.replace("gb200", "b200").replace("unit = \"rack\"", "unit = \"gpu\"");
    text.push_str(&figure("fleet.network_w_per_gpu", "100.0"));
    text.push_str(&figure("fleet.idle_w_per_gpu", "300.0"));
    text = text
        .replace("isl = 1024", "isl = 512")
        .replace("isl = 8192", "isl = 256")
        .replace("osl = 1024", "osl = 512");
    let mut site = parse_site(&text, &["power.contract_mw=1.0".to_owned()]).unwrap();
    site.device_transfer = None;
    site.fleet.count = None;
    site.fleet.provisioned_w_per_gpu = None;
    site.money.price_per_mtok = Some(Amount::try_from("40".to_owned()).unwrap());
    (plan(&site, &calibration, &OPTIONS).unwrap(), site)
}

fn has_row(all: &[Element], parts: &[&str]) -> bool {
    named(all, "tr").any(|row| parts.iter().all(|part| row.text.contains(part)))
}

/// The places of the bars or points of one chart: `data-x` and `data-y`.
fn drawn(page: &str, id: &str) -> Vec<(f64, String)> {
    let chart = page.split(&format!(r#"id="{id}""#)).nth(1).unwrap().split("</svg>").next().unwrap();
    let part = |text: &str, name: &str| {
        text.split(&format!("{name}=\"")).nth(1).unwrap().split('"').next().unwrap().to_owned()
    };
    let points = chart.split(r#"<g class="point""#).skip(1);
    points.map(|text| (part(text, "data-x").parse().unwrap(), part(text, "data-y"))).collect()
}

#[test]
fn the_page_of_every_shipped_site_nests_and_refers_to_nothing_outside() {
    let mut count = 0;
    for entry in std::fs::read_dir(repository("sites")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "toml") {
            let (plan, site) = shipped(path.file_stem().unwrap().to_str().unwrap());
            let all = assert_sound(&plan_page(&plan, &site).unwrap());
            assert!(charts(&all).count() >= 4, "{}: {} charts", site.id, charts(&all).count());
            assert!(
                has_row(&all, &["GPUs that work", &format_significant(plan.outcome.gpus)]),
                "{}",
                site.id
            );
            count += 1;
        }
    }
    assert!(count >= 11, "{count}");
}

#[test]
fn every_output_boundary_and_sensitivity_of_the_plan_is_drawn_at_its_value() {
    let (plan, site) = measured();
    let page = plan_page(&plan, &site).unwrap();
    let all = assert_sound(&page);
    let outcome = &plan.outcome;
    let boundaries = [
        *outcome.output_tokens_per_s_per_board_mw.value().unwrap(),
        *outcome.output_tokens_per_s_per_node_mw.value().unwrap(),
        outcome.output_tokens_per_s_per_it_mw,
        outcome.output_tokens_per_s_per_facility_mw,
    ];
    assert!(boundaries.windows(2).all(|pair| pair[0] > pair[1]), "{boundaries:?}");
    let bars = drawn(&page, "power-boundaries");
    assert_eq!(bars.len(), 4);
    for (value, (x, name)) in boundaries.iter().zip(&bars) {
        let scales = [1.0, 1e3, 1e6, 1e9];
        assert!(scales.iter().any(|scale| (x * scale / value - 1.0).abs() < 1e-9), "{name}: {x} for {value}");
    }
    // Full, cash and marginal cost at each tenth.
    let costs = drawn(&page, "cost-load");
    assert_eq!(costs.len(), 30);
    for point in &plan.load_curve {
        for cost in [
            &point.cost_per_mtok_output,
            &point.cash_cost_per_mtok_output,
            &point.marginal_cost_per_mtok_output,
        ] {
            let (x, cost) = (point.utilization * 100.0, cost.value().unwrap().to_string());
            assert!(costs.contains(&(x, cost.clone())), "{cost} at {x} in {costs:?}");
        }
        for interval in point.intervals.values() {
            assert!(interval.p05 <= interval.p50 && interval.p50 <= interval.p95);
        }
    }
    assert_eq!(page.matches(r#"class="area""#).count(), 3);
    // The calibration without noise moves nothing; every other input stands in the tornado of what it moves.
    let tornado = drawn(&page, "sensitivity-tokens");
    for found in &plan.sensitivities {
        let moves = (found.tokens_per_day_at_high - found.tokens_per_day_at_low).abs()
            > 1e-6 * outcome.output_tokens_per_day;
        assert_eq!(tornado.iter().any(|(_, name)| name.starts_with(found.input)), moves, "{}", found.input);
    }
    let share = outcome.break_even_utilization.value().unwrap() * 100.0;
    assert!(page.contains(&format!("breaks even at a utilisation of {share:.1} %")), "{share}");
    assert!(has_row(&all, &["fleet.network_w_per_gpu", "100", "assumed"]));
}

#[test]
fn the_ramp_the_grade_the_flags_and_every_formula_stand_on_the_page_and_in_the_document() {
    let (plan, site) = shipped("campus-ia-fouju");
    let page = plan_page(&plan, &site).unwrap();
    let all = assert_sound(&page);
    let steps = drawn(&page, "ramp-steps");
    assert_eq!(steps.len(), 3);
    for (step, (x, name)) in plan.ramp.iter().zip(&steps) {
        assert!((x * 1e12 / step.output_tokens_per_day - 1.0).abs() < 1e-9 && name.starts_with(&step.date));
        let interval = step.output_tokens_per_day_interval;
        assert!(interval.p05 < step.output_tokens_per_day && step.output_tokens_per_day < interval.p95);
    }
    let document = plan_markdown(&plan, &site);
    assert!(page.contains("Grade C of the calibration") && document.contains("published, grade C"));
    for flag in &plan.flags {
        assert!(named(&all, "li").any(|item| item.text == format!("! {flag}")), "{flag}");
        assert!(document.contains(flag.as_str()), "{flag}");
    }
    let formulas: Vec<&Element> =
        named(&all, "li").filter(|item| item.within.contains(&"details".to_owned())).collect();
    assert_eq!(formulas.len(), plan.explanation.len());
    for (item, line) in formulas.iter().zip(&plan.explanation) {
        assert_eq!(item.text, *line);
        assert!(document.contains(line.as_str()), "{line}");
    }
    for step in &plan.ramp {
        assert!(document.contains(&format!("| {} | {} |", step.date, format_significant(step.mw))));
    }
}

#[test]
fn hostile_texts_of_a_site_stay_texts() {
    for hostile in
        ["<script>alert(1)</script>", "\"><img src=x>", "</title></svg><iframe>", "{{ 7 * 7 }}", "a | b"]
    {
        let (mut plan, mut site) = shipped("campus-ia-fouju");
        plan.site = hostile.to_owned();
        plan.flags.push(format!("extrapolated {hostile}"));
        plan.ramp[0].date = hostile.to_owned();
        plan.explanation.push(hostile.to_owned());
        site.status = hostile.to_owned();
        site.power.pue.source = hostile.to_owned();
        site.demand.mix[0].name = hostile.to_owned();
        let all = assert_sound(&plan_page(&plan, &site).unwrap());
        for place in ["h1", "title", "li", "td", "p", "text"] {
            assert!(
                named(&all, place).any(|element| element.text.contains(hostile)),
                "{hostile} in <{place}>"
            );
        }
        let document = plan_markdown(&plan, &site);
        // Formulas stand in code spans, in which nothing is markup.
        let mut outside = document.lines().filter(|line| !line.starts_with("- `"));
        assert!(!outside.any(|line| ["<script", "<iframe", "<img"].iter().any(|tag| line.contains(tag))));
        let columns = |line: &str| line.replace("\\|", "").matches('|').count();
        let figures = document.split("## Figures of the site").nth(1).unwrap().lines();
        let rows: Vec<usize> = figures.filter(|line| line.starts_with("| power.")).map(columns).collect();
        assert!(rows.len() == 2 && rows.iter().all(|count| *count == 6), "{rows:?}");
    }
}

#[test]
fn the_ending_of_each_file_decides_what_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let site = repository("sites/gw-reference.toml");
    let args = ["plan", "--site", site.to_str().unwrap(), "--draws", "50", "--price-per-mtok", "9.99"];
    let out = ["--out", "p.html", "--out", "p.md", "--out", "p.json"];
    let done = tokmeter(folder.path(), &[&args[..], &out].concat());
    assert_eq!(done.code, Some(0), "{}", done.stderr);
    let text = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert!(text("p.html").starts_with("<!doctype html>") && text("p.md").starts_with("# "));
    let json: serde_json::Value = serde_json::from_str(&text("p.json")).unwrap();
    assert_eq!(json["schema"], "tokmeter-plan/1");
    let share = json["outcome"]["break_even_utilization"].as_f64().unwrap();
    assert!(text("p.html").contains(&format!("breaks even at a utilisation of {:.1} %", share * 100.0)));
    let done = tokmeter(folder.path(), &[&args[..], &["--format", "markdown"]].concat());
    assert_eq!(done.stdout, text("p.md"));
    let done = tokmeter(folder.path(), &[&args[..], &["--out", "p.txt", "--out", "p.pdf"]].concat());
    assert_eq!(done.code, Some(2), "{}", done.stderr);
    assert!(done.stderr.contains("--out is 'p.pdf', expected an ending"), "{}", done.stderr);
    assert!(!folder.path().join("p.txt").exists(), "nothing is written before every place is known");
    let done = tokmeter(folder.path(), &[&args[..], &["--out", "p.txt"]].concat());
    assert_eq!(done.stdout, text("p.txt"));
    let done =
        tokmeter(folder.path(), &["plan", "--site", site.to_str().unwrap(), "--price-per-mtok", "free"]);
    assert_eq!(done.code, Some(2), "{}", done.stderr);
    assert!(done.stderr.contains("--price-per-mtok: amount 'free' is no decimal number"), "{}", done.stderr);
}

#[test]
fn what_a_plan_cannot_know_is_told_in_words() {
    let (mut plan, site) = shipped("campus-ia-fouju");
    plan.outcome.marginal_cost_per_mtok_output = Maybe::missing("idle_power_unknown");
    let all = assert_sound(&plan_page(&plan, &site).unwrap());
    assert!(has_row(&all, &["per Mtok output, marginal", "(idle power unknown)"]));
    let missing = ["boards: energy not measured", "nodes: boards and hosts: network not stated"];
    for words in missing {
        assert!(named(&all, "li").any(|item| item.text.contains(words)), "{words}");
    }
    assert!(
        named(&all, "p").any(|text| text.text.starts_with("No break-even utilisation (no price per mtok)"))
    );
}
