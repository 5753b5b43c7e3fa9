use super::*;

#[test]
fn a_spread_is_the_median_and_the_quartiles() {
    let spread = Spread::of(&mut [5.0, 1.0, 4.0, 2.0, 3.0]);
    assert_eq!((spread.low, spread.median, spread.high), (2.0, 3.0, 4.0));
    let one = Spread::of(&mut [7.0]);
    assert_eq!((one.low, one.median, one.high), (7.0, 7.0, 7.0));
}

#[test]
fn a_drift_cancels_within_a_round() {
    // Every slice is one slower than the one before it; the first is really twice the second.
    let clock = std::cell::Cell::new(0.0);
    let slice = |factor: f64| {
        clock.set(clock.get() + 1.0);
        factor * (1000.0 + clock.get())
    };
    let pair = paired(10, || slice(2.0), || slice(1.0));
    assert!((pair.ratio.median - 2.0).abs() < 1e-9, "{pair:?}");
    assert_eq!(pair.rounds, 10);
}

#[test]
fn every_operation_of_a_slice_is_counted() {
    for threads in [1usize, 2, 5] {
        let crew: Vec<usize> = (0..threads).collect();
        let made = std::sync::atomic::AtomicU64::new(0);
        let (time, operations) = contend(
            &crew,
            Duration::from_millis(2),
            |name| name,
            |_| {
                made.fetch_add(1, Ordering::Relaxed);
            },
        );
        assert_eq!(operations, made.into_inner());
        assert!(operations > 0 && time > 0.0);
    }
}
