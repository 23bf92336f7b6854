//! Lists and ranges as they are typed on the command line or written in a suite.

/// Most values one list may expand to; a slip such as `1..1000000` is refused, not measured.
const MOST_VALUES: usize = 1000;

/// Expands `8`, `1,8,32`, `1..64*2` (1, 2, 4 … 64), `128..512+128` and `1..4` (steps of 1), in the order written.
///
/// # Errors
/// Names the part that is not understood and what was expected.
pub fn parse_numbers(text: &str) -> Result<Vec<u32>, String> {
    let mut values = Vec::new();
    for part in text.split(',') {
        expand(part.trim(), &mut values)?;
        if values.len() > MOST_VALUES {
            return Err(format!("'{text}' expands to more than {MOST_VALUES} values"));
        }
    }
    Ok(values)
}

enum Stride {
    Add(u32),
    Multiply(u32),
}

fn expand(part: &str, values: &mut Vec<u32>) -> Result<(), String> {
    let expected =
        || format!("'{part}' is no number or range, expected for example 8, 1..64*2 or 128..512+128");
    let number = |text: &str| text.trim().parse::<u32>().map_err(|_| expected());
    let Some((first, rest)) = part.split_once("..") else {
        values.push(number(part)?);
        return Ok(());
    };
    let (last, stride) = if let Some((last, factor)) = rest.split_once('*') {
        (last, Stride::Multiply(number(factor)?))
    } else if let Some((last, step)) = rest.split_once('+') {
        (last, Stride::Add(number(step)?))
    } else {
        (rest, Stride::Add(1))
    };
    let (first, last) = (number(first)?, number(last)?);
    let grows = match stride {
        Stride::Add(step) => step > 0,
        Stride::Multiply(factor) => factor > 1 && first > 0,
    };
    if !grows || first > last {
        return Err(format!("range '{part}' does not grow from {first} to {last}"));
    }
    let mut value = first;
    while value <= last && values.len() <= MOST_VALUES {
        values.push(value);
        let next = match stride {
            Stride::Add(step) => value.checked_add(step),
            Stride::Multiply(factor) => value.checked_mul(factor),
        };
        match next {
            Some(next) => value = next,
            None => break,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_and_ranges_expand_in_the_order_written() {
        assert_eq!(parse_numbers("8"), Ok(vec![8]));
        assert_eq!(parse_numbers("1, 8,32"), Ok(vec![1, 8, 32]));
        assert_eq!(parse_numbers("1..64*2"), Ok(vec![1, 2, 4, 8, 16, 32, 64]));
        assert_eq!(parse_numbers("128..512+128,7"), Ok(vec![128, 256, 384, 512, 7]));
        assert_eq!(parse_numbers("1..3"), Ok(vec![1, 2, 3]));
        assert_eq!(parse_numbers("4294967295..4294967295*2"), Ok(vec![u32::MAX]));
    }

    #[test]
    fn nonsense_and_endless_ranges_are_refused() {
        for bad in
            ["", "a", "1,,2", "8..1", "0..8*2", "1..8*1", "1..8+0", "1..", "-1", "1.5", "1..4000000000"]
        {
            assert!(parse_numbers(bad).is_err(), "'{bad}' was accepted");
        }
    }
}
