use std::time::Instant;
fn main() {
    let vocab = 2048usize;
    for rows in [4usize, 8, 16, 64, 256, 512] {
        let make = |s: usize| -> Vec<f32> { (0..rows * vocab).map(|i| ((i * 7919 + s * 104729) % 10007) as f32 / 10007.0 * 12.0 - 6.0).collect() };
        let (p, q) = (make(1), make(2));
        let ids: Vec<u32> = (0..rows as u32).collect();
        let n = 16384 / rows;
        // one thread
        let pool = rayon::ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        let mut best = f64::MAX;
        for _ in 0..5 {
            let t = Instant::now();
            pool.install(|| for _ in 0..n { std::hint::black_box(implicit_reward::read_rows(&p, &q, &ids, 5).unwrap()); });
            best = best.min(t.elapsed().as_secs_f64());
        }
        println!("{rows} rows: {:.0} ns a row", best / (n * rows) as f64 * 1e9);
    }
}
