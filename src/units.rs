//! Quantities as people write and read them. Values are stored as plain integers or floats whose unit ends their name
//! (`_ns`, `_bytes`, `_per_s`); this module only parses and prints.

/// `1.24 s`, `8.31 ms`, `420 ns`: three significant digits.
pub fn format_ns(ns: f64) -> String {
    let (value, unit) = match ns.abs() {
        abs if abs >= 1e9 => (ns / 1e9, "s"),
        abs if abs >= 1e6 => (ns / 1e6, "ms"),
        abs if abs >= 1e3 => (ns / 1e3, "µs"),
        _ => (ns, "ns"),
    };
    format!("{} {unit}", format_significant(value))
}

/// `93.8 MiB`.
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{} {}", format_significant(value), UNITS[unit]) }
}

/// `135M`, `8.03B`: parameters and the like, in thousands of thousands.
pub fn format_count(count: u64) -> String {
    let (scale, unit) = match count {
        0..1_000 => return count.to_string(),
        1_000..1_000_000 => (1e3, "K"),
        1_000_000..1_000_000_000 => (1e6, "M"),
        _ => (1e9, "B"),
    };
    format!("{}{unit}", format_significant(count as f64 / scale))
}

/// Three significant digits and thousands separators, no exponent: `0.0123`, `1.50`, `113`, `12,345`.
pub fn format_significant(value: f64) -> String {
    if !value.is_finite() {
        return value.to_string();
    }
    let magnitude = if value == 0.0 { 0 } else { value.abs().log10().floor() as i32 };
    let decimals = (2 - magnitude).clamp(0, 12) as usize;
    let text = format!("{value:.decimals$}");
    if magnitude < 3 { text } else { group_thousands(&text) }
}

fn group_thousands(integer: &str) -> String {
    let (sign, digits) = integer.strip_prefix('-').map_or(("", integer), |digits| ("-", digits));
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    format!("{sign}{grouped}")
}

/// `3 s`, `1 min 20 s`, `2 h 05 min`.
pub fn format_duration_s(seconds: f64) -> String {
    let whole = seconds.round().max(0.0) as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// Parses `512MiB`, `4GB`, `1.5GiB`, `1048576`. Decimal and binary units are kept apart.
///
/// # Errors
/// Says what was expected when the text is no size.
pub fn parse_bytes(text: &str) -> Result<u64, String> {
    let trimmed = text.trim();
    let split = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
    let (number, unit) = trimmed.split_at(split);
    let expected = || format!("'{text}' is no size, expected a number and a unit such as 512MiB or 4GB");
    let value: f64 = number.parse().map_err(|_| expected())?;
    let scale: u64 = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kib" => 1 << 10,
        "mib" => 1 << 20,
        "gib" => 1 << 30,
        "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err(expected()),
    };
    let bytes = value * scale as f64;
    if (1.0..=1e18).contains(&bytes) { Ok(bytes as u64) } else { Err(expected()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_significant_digits() {
        let cases = [
            (0.0, "0.00"),
            (0.01234, "0.0123"),
            (1.5, "1.50"),
            (112.6, "113"),
            (12345.4, "12,345"),
            (-4321.0, "-4,321"),
        ];
        for (value, text) in cases {
            assert_eq!(format_significant(value), text);
        }
    }

    #[test]
    fn times_choose_their_unit() {
        assert_eq!(format_ns(420.0), "420 ns");
        assert_eq!(format_ns(8_312_345.0), "8.31 ms");
        assert_eq!(format_ns(1.24e9), "1.24 s");
        assert_eq!(format_duration_s(80.0), "1 min 20 s");
        assert_eq!(format_count(8_030_261_248), "8.03B");
        assert_eq!(format_count(134_515_008), "135M");
        assert_eq!(format_duration_s(7500.0), "2 h 05 min");
    }

    #[test]
    fn sizes_are_read_with_binary_and_decimal_units() {
        assert_eq!(parse_bytes("512MiB"), Ok(512 << 20));
        assert_eq!(parse_bytes("4 GB"), Ok(4_000_000_000));
        assert_eq!(parse_bytes("1.5kib"), Ok(1536));
        for bad in ["", "MiB", "-1MiB", "12 parsecs", "0", "NaN", "1e9"] {
            assert!(parse_bytes(bad).is_err(), "{bad} was accepted");
        }
    }
}
