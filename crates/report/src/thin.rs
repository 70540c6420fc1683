//! Fewer points without a different picture.

/// Of each bucket of neighbours, the lowest and the highest point, in their order, so that every
/// spike survives. At most `2 * buckets` points; short input comes back unchanged.
pub(crate) fn extremes(points: &[(f64, f64)], buckets: usize) -> Vec<(f64, f64)> {
    if points.len() <= 2 * buckets {
        return points.to_vec();
    }
    let mut out = Vec::with_capacity(2 * buckets);
    for chunk in points.chunks(points.len().div_ceil(buckets)) {
        let mut low = 0;
        let mut high = 0;
        for (i, point) in chunk.iter().enumerate() {
            if point.1 < chunk[low].1 {
                low = i;
            }
            if point.1 > chunk[high].1 {
                high = i;
            }
        }
        out.push(chunk[low.min(high)]);
        if low != high {
            out.push(chunk[low.max(high)]);
        }
    }
    out
}

/// Every k-th item and the last, at most about `n` of them.
pub(crate) fn every<T: Copy>(items: &[T], n: usize) -> Vec<T> {
    let stride = items.len().div_ceil(n.max(1)).max(1);
    let mut out: Vec<T> = items.iter().copied().step_by(stride).collect();
    if !items.is_empty() && !(items.len() - 1).is_multiple_of(stride) {
        out.extend(items.last().copied());
    }
    out
}

/// Centred mean of `window` neighbours (an odd count); at the ends, of those that there are.
pub(crate) fn running_mean(points: &[(f64, f64)], window: usize) -> Vec<(f64, f64)> {
    let half = window / 2;
    (0..points.len())
        .map(|i| {
            // The window shrinks evenly on both sides, so that a straight line stays where it is.
            let reach = half.min(i).min(points.len() - 1 - i);
            let near = &points[i - reach..=i + reach];
            let mean = near.iter().map(|p| p.1).sum::<f64>() / near.len() as f64;
            (points[i].0, mean)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spikes_survive_thinning() {
        let mut points: Vec<(f64, f64)> = (0..5000).map(|i| (f64::from(i), 0.0)).collect();
        points[3210].1 = 9.0;
        points[77].1 = -4.0;
        let thin = extremes(&points, 200);
        assert!(thin.len() <= 400);
        assert!(thin.contains(&(3210.0, 9.0)));
        assert!(thin.contains(&(77.0, -4.0)));
        assert!(thin.is_sorted_by(|a, b| a.0 < b.0));
    }

    #[test]
    fn the_last_point_survives_striding() {
        let items: Vec<usize> = (0..1001).collect();
        let thin = every(&items, 100);
        assert_eq!(thin.last(), Some(&1000));
        assert!(thin.len() <= 102);
        assert!(every::<usize>(&[], 10).is_empty());
        assert_eq!(every(&[1], 10), [1]);
    }

    #[test]
    fn running_mean_keeps_a_straight_line() {
        let points: Vec<(f64, f64)> = (0..100)
            .map(|i| (f64::from(i), 2.0 * f64::from(i)))
            .collect();
        for (mean, point) in running_mean(&points, 9).iter().zip(&points) {
            // Sums of small integers are exact in f64.
            assert!((mean.1 - point.1).abs() < 1e-12);
        }
    }
}
