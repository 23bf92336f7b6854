//! How much work was done by which time. Tokens appear in steps; the work for them is taken to be spread evenly over
//! the time it took, which lets it be counted between two updates of an energy counter.

/// A piece of work: a pass of a static cell, a step of a serving one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub begin_ns: u64,
    pub end_ns: u64,
    pub tokens_in: u64,
    pub tokens_out: u64,
}

/// Prompt and output tokens whose work lies in [`from_ns`, `to_ns`].
pub fn tokens_between(pieces: &[Piece], from_ns: u64, to_ns: u64) -> (f64, f64) {
    pieces.iter().fold((0.0, 0.0), |(tokens_in, tokens_out), piece| {
        let share = share_inside(piece, from_ns, to_ns);
        (tokens_in + share * piece.tokens_in as f64, tokens_out + share * piece.tokens_out as f64)
    })
}

fn share_inside(piece: &Piece, from_ns: u64, to_ns: u64) -> f64 {
    if piece.end_ns <= piece.begin_ns {
        return if from_ns < piece.end_ns && piece.end_ns <= to_ns { 1.0 } else { 0.0 };
    }
    let inside_ns = piece.end_ns.min(to_ns).saturating_sub(piece.begin_ns.max(from_ns));
    inside_ns as f64 / (piece.end_ns - piece.begin_ns) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn work_counts_by_the_share_of_its_time() {
        let pieces = [
            Piece { begin_ns: 0, end_ns: 100, tokens_in: 50, tokens_out: 10 },
            Piece { begin_ns: 100, end_ns: 300, tokens_in: 0, tokens_out: 20 },
            Piece { begin_ns: 300, end_ns: 300, tokens_in: 0, tokens_out: 1 },
        ];
        assert_eq!(tokens_between(&pieces, 0, 300), (50.0, 31.0));
        assert_eq!(tokens_between(&pieces, 80, 150), (10.0, 7.0));
        assert_eq!(tokens_between(&pieces, 300, 400), (0.0, 0.0));
    }
}
