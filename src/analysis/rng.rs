//! Random numbers for forecasts: SplitMix64 (Steele, Lea and Flood, 2014), and what is drawn from it with additions,
//! products and square roots alone, so that a seed gives the same bits everywhere.

/// A stream of numbers; equal seeds give equal streams.
#[derive(Clone, Debug)]
pub(super) struct Rng(u64);

impl Rng {
    pub(super) fn new(seed: u64) -> Self {
        Rng(seed)
    }

    fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// At least 0, below 1.
    pub(super) fn uniform(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Mean 0, variance 1: twelve uniform numbers (Irwin and Hall), normal to within what a forecast can tell.
    pub(super) fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }

    /// Triangular over `min` to `max` with its peak at `mode`.
    pub(super) fn triangular(&mut self, min: f64, mode: f64, max: f64) -> f64 {
        let share = self.uniform();
        let width = max - min;
        if width <= 0.0 {
            return mode;
        }
        let turn = (mode - min) / width;
        if share < turn {
            min + (share * width * (mode - min)).sqrt()
        } else {
            max - ((1.0 - share) * width * (max - mode)).sqrt()
        }
    }

    /// Below `count`, which is at least 1.
    pub(super) fn index(&mut self, count: usize) -> usize {
        ((self.uniform() * count as f64) as usize).min(count - 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stream_is_the_published_one() {
        // First outputs of SplitMix64 for the seed 1234567, from the reference implementation.
        let mut rng = Rng::new(1_234_567);
        assert_eq!(rng.next_u64(), 6_457_827_717_110_365_317);
        assert_eq!(rng.next_u64(), 3_203_168_211_198_807_973);
    }

    #[test]
    fn draws_have_the_mean_and_spread_they_claim() {
        let mut rng = Rng::new(7);
        let normals: Vec<f64> = (0..20_000).map(|_| rng.normal()).collect();
        let mean = normals.iter().sum::<f64>() / 20_000.0;
        let variance = normals.iter().map(|value| value * value).sum::<f64>() / 20_000.0;
        assert!(mean.abs() < 0.03 && (variance - 1.0).abs() < 0.05, "{mean} {variance}");
        let triangles: Vec<f64> = (0..20_000).map(|_| rng.triangular(1.0, 2.0, 6.0)).collect();
        assert!((triangles.iter().sum::<f64>() / 20_000.0 - 3.0).abs() < 0.05);
        assert!(triangles.iter().all(|value| (1.0..=6.0).contains(value)));
        assert_eq!(rng.triangular(2.0, 2.0, 2.0), 2.0);
    }
}
