//! What a check found, as a person and as a program read it. Fits 80 columns.

use comfy_table::Table;
use serde::Serialize;

use super::numerics::{LAYERS, VOCAB_SIZE};
use crate::arch::Op as OpKind;
use crate::backend::check::{Deviation, MOST_BY_ROUNDING, OpCheck, Verdict};
use crate::cmd::table;
use crate::model::check::ForwardCheck;
use crate::weights::StoredDType;

/// All that was found.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    pub(super) device: String,
    pub(super) backend: &'static str,
    pub(super) compute_dtype: &'static str,
    pub(super) threads: usize,
    /// What computed products of more than 64 rows: a library, or the backend's own code where there is none.
    pub(super) large_products: Option<String>,
    /// Whose shapes the forward pass has, or whose blocks are checked; nothing where no model takes part.
    pub(super) model: Option<String>,
    /// `synthetic`, or the format of the file.
    pub(super) weights: Option<&'static str>,
    /// What was asked for, where that is not everything.
    pub(super) only: Option<Only>,
    pub(super) ops: Vec<Op>,
    pub(super) forward: Vec<Forward>,
    pub(super) passed: bool,
}

/// The part of the check that was asked for, and what it leaves out.
#[derive(Debug, Serialize)]
pub(super) struct Only {
    op: &'static str,
    /// Text that the cases contain.
    case: Option<String>,
    cases: usize,
    cases_of_op: usize,
    not_checked: Vec<&'static str>,
}

impl Only {
    pub(super) fn new(op: OpKind, case: Option<String>, cases: usize, cases_of_op: usize) -> Self {
        let others = OpKind::ALL.into_iter().filter(|&other| other != op).map(OpKind::name);
        let not_checked = others.chain(["forward pass"]).collect();
        Only { op: op.name(), case, cases, cases_of_op, not_checked }
    }

    fn text(&self) -> String {
        let cases = match self.cases_of_op - self.cases {
            0 => String::new(),
            left => format!("{left} other cases of {}, ", self.op),
        };
        format!("not checked: {cases}the other operations, the forward pass")
    }
}

/// The worst value of some comparisons.
#[derive(Debug, Serialize)]
struct Worst {
    /// Largest absolute difference of any value.
    max_error: Option<f64>,
    /// Largest share of the tolerance used by any value; `null` where that is no number.
    tolerance_used: Option<f64>,
    /// The error of that value, and its tolerance.
    worst_error: Option<f64>,
    tolerance: Option<f64>,
    verdict: Verdict,
}

impl From<Deviation> for Worst {
    fn from(deviation: Deviation) -> Self {
        Worst {
            max_error: number(deviation.max_error),
            tolerance_used: number(deviation.tolerance_used),
            worst_error: number(deviation.worst_error),
            tolerance: number(deviation.tolerance),
            verdict: deviation.verdict(),
        }
    }
}

impl Worst {
    /// `WORST ERROR`, `TOLERANCE`, `SHARE OF TOLERANCE` and `RESULT`.
    fn cells(&self) -> [String; 4] {
        let result = match self.verdict {
            Verdict::Ok => "ok",
            Verdict::OverTolerance => "OVER",
            Verdict::Wrong => "WRONG",
        };
        let [error, tolerance] = [self.worst_error, self.tolerance].map(scientific);
        [error, tolerance, percent(self.tolerance_used), result.to_owned()]
    }

    /// What is the matter, in words.
    fn text(&self) -> String {
        match (self.tolerance_used, self.tolerance, self.worst_error) {
            (Some(_), ..) => format!(
                "error {}, tolerance {}: {} of it",
                scientific(self.worst_error),
                scientific(self.tolerance),
                percent(self.tolerance_used)
            ),
            (None, Some(0.0), _) => "not the same bits".to_owned(),
            _ => "not finite".to_owned(),
        }
    }
}

/// One operation over all cases.
#[derive(Debug, Serialize)]
pub(super) struct Op {
    op: &'static str,
    /// How the matrices were stored.
    stored: &'static str,
    cases: usize,
    #[serde(flatten)]
    worst: Worst,
    /// The case of the worst value; nothing where every value is exact.
    worst_case: Option<String>,
    passed: bool,
    failed: Vec<Failure>,
}

#[derive(Debug, Serialize)]
struct Failure {
    case: String,
    #[serde(flatten)]
    worst: Worst,
}

/// One way of cutting the prompts into steps.
#[derive(Debug, Serialize)]
pub(super) struct Forward {
    case: &'static str,
    steps: usize,
    logits: usize,
    #[serde(flatten)]
    worst: Worst,
    /// The prompt and the token of the worst value; nothing where every value is exact, or where it is an average.
    worst_case: Option<String>,
    passed: bool,
}

/// One line for each operation, in the order in which they were first checked.
pub(super) fn grouped(checks: &[OpCheck], stored: StoredDType) -> Vec<Op> {
    let mut names: Vec<&str> = Vec::new();
    for check in checks {
        if !names.contains(&check.op) {
            names.push(check.op);
        }
    }
    let of = |name| checks.iter().filter(|check| check.op == name).collect::<Vec<_>>();
    names.into_iter().map(|name| Op::new(&of(name), stored)).collect()
}

impl Op {
    /// From all cases of one operation, of which there are some.
    fn new(checks: &[&OpCheck], stored: StoredDType) -> Self {
        let mut worst = Deviation::NONE;
        let mut worst_case = None;
        for check in checks {
            let next = worst.or(check.deviation);
            if next.tolerance_used.to_bits() != worst.tolerance_used.to_bits() {
                worst_case = Some(check.case.clone());
            }
            worst = next;
        }
        let failed = checks.iter().filter(|check| !check.passed());
        let failed: Vec<Failure> =
            failed.map(|check| Failure { case: check.case.clone(), worst: check.deviation.into() }).collect();
        Op {
            op: checks.first().map_or("", |check| check.op),
            stored: stored.name(),
            cases: checks.len(),
            worst: worst.into(),
            worst_case,
            passed: failed.is_empty(),
            failed,
        }
    }

    pub(super) fn passed(&self) -> bool {
        self.passed
    }
}

impl From<ForwardCheck> for Forward {
    fn from(check: ForwardCheck) -> Self {
        Forward {
            passed: check.passed(),
            case: check.case,
            steps: check.steps,
            logits: check.logits,
            worst: check.deviation.into(),
            worst_case: check.worst_at,
        }
    }
}

impl Forward {
    pub(super) fn passed(&self) -> bool {
        self.passed
    }
}

/// JSON has no NaN and no infinity.
fn number(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

impl Report {
    pub(super) fn json(&self) -> anyhow::Result<String> {
        Ok(serde_json::to_string_pretty(self)? + "\n")
    }

    pub(super) fn table(&self) -> String {
        let mut text = self.head();
        text.push_str(&format!("\n{}\n", self.ops_table()));
        for op in &self.ops {
            if !op.failed.is_empty() {
                text.push_str(&format!("\nfailed cases of {} ({})\n", op.op, op.stored));
            }
            for failure in &op.failed {
                text.push_str(&format!("  {}\n    {}\n", failure.case, failure.worst.text()));
            }
        }
        if self.only.is_none() {
            text.push_str(&format!("\n{}\n{}\n", self.forward_head(), self.forward_table()));
        }
        text.push_str(&format!("\n{}\n", self.conclusion()));
        text
    }

    fn head(&self) -> String {
        let mut text = format!(
            "{} · {} on {}, {} threads, against the reference\n",
            self.backend, self.compute_dtype, self.device, self.threads
        );
        if let Some(library) = &self.large_products {
            text.push_str(&format!("large products by {library}\n"));
        }
        if let Some(only) = &self.only {
            let of = if only.cases == only.cases_of_op { "all" } else { "only" };
            text.push_str(&format!("{of} {} of {} cases of {}\n", only.cases, only.cases_of_op, only.op));
        }
        text
    }

    fn forward_head(&self) -> String {
        format!(
            "forward pass of {}\nits shapes, at most {LAYERS} layers and {VOCAB_SIZE} tokens, {} weights\n",
            self.model.as_deref().unwrap_or("no model"),
            self.weights.unwrap_or("no"),
        )
    }

    /// Under each operation its worst case.
    fn ops_table(&self) -> String {
        let titles =
            ["OPERATION", "STORED", "CASES", "WORST ERROR", "TOLERANCE", "SHARE OF TOLERANCE", "RESULT"];
        let mut table = table::plain(&titles, 2..6);
        let mut notes = vec![Some("WORST CASE".to_owned())];
        for op in &self.ops {
            let [error, tolerance, share, result] = op.worst.cells();
            let cases = op.cases.to_string();
            table.add_row([op.op.to_owned(), op.stored.to_owned(), cases, error, tolerance, share, result]);
            notes.push(op.worst_case.clone());
        }
        interleaved(&table, notes)
    }

    /// Under each row what was compared.
    fn forward_table(&self) -> String {
        let titles = ["STEPS", "LOGITS", "WORST ERROR", "TOLERANCE", "SHARE OF TOLERANCE", "RESULT"];
        let mut table = table::plain(&titles, 0..5);
        let mut notes = vec![Some("CASE".to_owned())];
        for way in &self.forward {
            let [error, tolerance, share, result] = way.worst.cells();
            table.add_row([way.steps.to_string(), way.logits.to_string(), error, tolerance, share, result]);
            let worst = way.worst_case.as_ref().map_or(String::new(), |at| format!("; worst: {at}"));
            notes.push(Some(format!("{}{worst}", way.case)));
        }
        interleaved(&table, notes)
    }

    /// Whether all is well, and if not, whether that is rounding or a bug.
    fn conclusion(&self) -> String {
        let ops = self.ops.iter().map(|op| op.worst.verdict);
        let worst = ops.chain(self.forward.iter().map(|way| way.worst.verdict)).max();
        let verdict = match worst {
            None | Some(Verdict::Ok) => match &self.only {
                Some(only) => format!("ok: {} of {} cases of {}", only.cases, only.cases_of_op, only.op),
                None => "ok".to_owned(),
            },
            Some(Verdict::OverTolerance) => format!(
                "FAILED: just over tolerance, by at most {MOST_BY_ROUNDING} times: more rounding than expected.\n\
                 Compare with another backend or another --dtype before looking for a bug."
            ),
            Some(Verdict::Wrong) => format!(
                "FAILED: wrong values (not finite, not the same bits, or more than {MOST_BY_ROUNDING} times the\n\
                 tolerance): a bug, no rounding."
            ),
        };
        match &self.only {
            None => verdict,
            Some(only) => format!("{verdict}\n{}", only.text()),
        }
    }
}

/// The table's lines, each with its note under it.
fn interleaved(table: &Table, notes: Vec<Option<String>>) -> String {
    let lines = table::lines(table).zip(notes).flat_map(|(line, note)| {
        let note = note.map(|note| format!("   {note}"));
        [Some(line), note].into_iter().flatten()
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn scientific(value: Option<f64>) -> String {
    value
        .map_or("none".to_owned(), |value| if value == 0.0 { "0".to_owned() } else { format!("{value:.1e}") })
}

fn percent(share: Option<f64>) -> String {
    share.map_or("none".to_owned(), |share| format!("{:.1} %", share * 100.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op_check(op: &'static str, error: f64, tolerance: f64) -> OpCheck {
        let deviation = Deviation::of(0, error, tolerance);
        OpCheck { op, case: format!("GQA 3, error {error}"), deviation }
    }

    fn report(checks: &[OpCheck]) -> Report {
        let ops = grouped(checks, StoredDType::F32);
        let passed = ops.iter().all(Op::passed);
        Report {
            device: "cpu".to_owned(),
            backend: "cpu",
            compute_dtype: "f32",
            threads: 2,
            large_products: None,
            model: Some("tiny".to_owned()),
            weights: Some("synthetic"),
            only: None,
            ops,
            forward: Vec::new(),
            passed,
        }
    }

    fn json(report: &Report) -> serde_json::Value {
        serde_json::from_str(&report.json().unwrap()).unwrap()
    }

    /// The words of the line of `op`, and the line under it.
    fn lines_of(text: &str, op: &str) -> (Vec<String>, String) {
        let mut lines = text.lines().skip_while(|line| !line.trim_start().starts_with(op));
        let words = lines.next().unwrap().split_whitespace().map(str::to_owned).collect();
        (words, lines.next().unwrap().trim().to_owned())
    }

    #[test]
    fn an_operation_shows_its_worst_case() {
        let report = report(&[
            op_check("embed", 0.0, 1e-5),
            op_check("mlp_in", 9e-6, 1e-4),
            op_check("mlp_in", 3e-6, 1.2e-5),
            op_check("mlp_in", 1e-6, 1e-5),
        ]);
        let text = report.table();
        let (words, worst) = lines_of(&text, "mlp_in");
        assert_eq!(words, ["mlp_in", "f32", "3", "3.0e-6", "1.2e-5", "25.0", "%", "ok"]);
        assert_eq!(worst, "GQA 3, error 0.000003");
        assert!(report.passed && text.ends_with("\nok\n"), "{text}");
        let op = &json(&report)["ops"][1];
        let expected = serde_json::json!({
            "op": "mlp_in", "stored": "f32", "cases": 3, "max_error": 9e-6, "tolerance_used": op["tolerance_used"],
            "worst_error": 3e-6, "tolerance": 1.2e-5, "verdict": "ok", "worst_case": "GQA 3, error 0.000003",
            "passed": true, "failed": [],
        });
        assert_eq!(op, &expected);
        assert!((op["tolerance_used"].as_f64().unwrap() - 0.25).abs() < 1e-12);
        // What is exact has no worst case.
        assert!(json(&report)["ops"][0]["worst_case"].is_null());
    }

    #[test]
    fn a_failure_says_whether_it_may_be_rounding() {
        let over = report(&[op_check("mlp_in", 1.1, 1.0)]);
        let text = over.table();
        assert!(text.contains("error 1.1e0, tolerance 1.0e0: 110.0 % of it"), "{text}");
        assert!(text.contains("FAILED: just over tolerance") && text.contains("--dtype"), "{text}");
        assert_eq!(json(&over)["ops"][0]["verdict"], "over_tolerance");
        let wrong = report(&[op_check("mlp_in", 1.1, 1.0), op_check("embed", 30.0, 1.0)]);
        let text = wrong.table();
        assert!(text.contains("FAILED: wrong values") && !text.contains("just over"), "{text}");
        assert_eq!(json(&wrong)["ops"][1]["verdict"], "wrong");
        assert!(!over.passed && !wrong.passed);
    }

    #[test]
    fn a_value_that_is_no_number_fails_and_stays_visible_among_good_ones() {
        let bad = op_check("attention", f64::NAN, 1.0);
        let report = report(&[op_check("attention", 1e-6, 1e-5), bad, op_check("attention", 1e-6, 1e-5)]);
        let text = report.table();
        assert!(
            text.contains("failed cases of attention (f32)\n  GQA 3, error NaN\n    not finite\n"),
            "{text}"
        );
        assert!(text.contains("FAILED: wrong values"), "{text}");
        let json = json(&report);
        assert_eq!((&json["passed"], &json["ops"][0]["cases"]), (&false.into(), &3.into()));
        assert!(json["ops"][0]["max_error"].is_null() && json["ops"][0]["worst_error"].is_null());
        assert_eq!(json["ops"][0]["worst_case"], "GQA 3, error NaN");
    }

    #[test]
    fn a_part_of_the_check_does_not_read_like_all_of_it() {
        let checks = [op_check("attention", 1e-6, 1e-5)];
        let only = |cases| Some(Only::new(OpKind::Attention, Some("GQA 3".to_owned()), cases, 9));
        let text = Report { only: only(1), ..report(&checks) }.table();
        assert!(
            text.contains("only 1 of 9 cases of attention\n") && !text.contains("forward pass of"),
            "{text}"
        );
        let end = "\nok: 1 of 9 cases of attention\n\
                   not checked: 8 other cases of attention, the other operations, the forward pass\n";
        assert!(text.ends_with(end), "{text}");
        let whole = Report { only: only(9), ..report(&checks) }.table();
        assert!(whole.ends_with("\nnot checked: the other operations, the forward pass\n"), "{whole}");
    }

    #[test]
    fn tables_fit_a_terminal() {
        use crate::backend::check::cases;
        let checks: Vec<OpCheck> = cases(|_| true)
            .iter()
            .map(|case| OpCheck {
                op: case.op().name(),
                case: case.text(),
                deviation: Deviation::of(0, 123.4e-3, case.text().len() as f64 * 1e-5),
            })
            .collect();
        let way = ForwardCheck {
            case: "log-probabilities: mean distance from f32, of a plain implementation's",
            steps: 123,
            logits: 196_608,
            deviation: Deviation::of(0, 1.5, 1.0),
            worst_at: None,
        };
        let named = "the same bits from graphs and from single launches";
        let at = ForwardCheck { case: named, worst_at: Some("prompt 4, token 17".to_owned()), ..way.clone() };
        let forward = [way, at].map(Forward::from).into();
        let large_products = Some("cuBLASLt 13.1.99 from 65 rows".to_owned());
        let text = Report { forward, large_products, ..report(&checks) }.table();
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}
